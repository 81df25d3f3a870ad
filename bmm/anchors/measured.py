"""What was measured of the models, checked and cut to what one tensor's merge takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import MergeError
from ..linalg import require_finite
from ..notation import Tensors

SOURCES = {
    "grams": "collect them first (bmm gram) and give them as grams={parameter name: [T Grams]}",
    "sequential_grams": "use bmm.merge or `bmm merge`, which collect them, or give grams={parameter name: [T Grams]}",
    "fisher": "use bmm.merge or `bmm merge`, which collect it, or give fisher=[{parameter name: diagonal}] by expert",
    "base_fisher": "use bmm.merge or `bmm merge`, which collect it, or give base_fisher={parameter name: diagonal}",
    "score": "use bmm.merge or `bmm merge` with tasks, or give score=function of a model's tensors",
}
"""Where each statistic comes from."""


@dataclass(frozen=True)
class Statistics:
    """What was measured of experts and base for methods that need it (``Anchor.needs``); all of it may be missing.

    ``grams``: parameter name -> T Grams (i, i) of the inputs of that weight; (i + 1, i + 1) where a bias joins, of
    which the weight's block is used. ``fisher``: T mappings from parameter name to a diagonal Fisher in the
    parameter's shape; ``base_fisher`` the same for the base. ``score``: how good a model is, higher is better, given
    its tensors by name.
    """

    grams: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    fisher: Sequence[Tensors] = ()
    base_fisher: Tensors | None = None
    score: Callable[[Tensors], float] | None = None

    def has(self, need: str, names: Collection[str]) -> bool:
        """Whether the statistic of that name is there for at least one of the parameters."""
        if need in ("grams", "sequential_grams"):
            return not set(names).isdisjoint(self.grams)
        return bool(self.fisher) if need == "fisher" else getattr(self, need) is not None


def grams_of(
    name: str, shape: tuple[int, int], stack: Sequence[Tensor], kept: Sequence[int], experts: int, device: torch.device
) -> tuple[Tensor, ...]:
    """The T Grams (i, i) of a weight (o, i), checked; the last row and column of a joined bias are cut off."""
    width = shape[1]
    if len(stack) != experts:
        raise MergeError(f"{name} has {len(stack)} Grams for {experts} experts", "collect one Gram an expert")
    for gram in stack:
        if tuple(gram.shape) not in ((width, width), (width + 1, width + 1)):
            raise MergeError(
                f"{name}: a Gram is {tuple(gram.shape)}, the weight has {width} inputs",
                f"it must be ({width}, {width}), one more with a joined bias; name (in, out) weights in `transposed`",
            )
    return tuple(stack[t][:width, :width].to(device) for t in kept)


def fisher_of(name: str, w0: Tensor, fisher: Tensors) -> Tensor:
    """A diagonal Fisher in the shape, dtype and device of ``w0``; zero where a parameter has none."""
    if name not in fisher:
        return torch.zeros_like(w0)
    found = fisher[name].to(w0)
    if found.shape != w0.shape:
        raise MergeError(f"{name}: its Fisher is {tuple(found.shape)}, not {tuple(w0.shape)}", "collect it again")
    require_finite(f"{name}: its Fisher", found)
    if bool((found < 0).any()):
        raise MergeError(f"{name}: its Fisher has negative entries", "a Fisher is a mean of squares; collect it again")
    return found
