"""Every tensor merged in a way of its own: its method, knobs, task weights and scale chosen by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import MergeError
from ..notation import Tensors
from .anchor import Anchor
from .inputs import Inputs, Progress, require_agreement
from .resources import keep_pages
from .streaming import Job, Statistics


@dataclass(frozen=True)
class Way:
    """How one tensor is merged: ``W_0 + scale * d`` with d from ``anchor`` at ``knobs``, checked by the caller, and the
    T task ``weights``, none of which leaves its task out at 0."""

    anchor: Anchor
    weights: Sequence[float]
    knobs: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0


def merge_each(
    base: Tensors,
    experts: Sequence[Tensors],
    way: Callable[[str], Way],
    *,
    names: Iterable[str] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Merge tensor by tensor, yielding (name, merged tensor); one tensor of the T experts is in memory at a time.

    Parameters
    ----------
    way : called once for each floating tensor.
    names : the tensors to merge, in this order; all of the base by default.
    dtypes : of merged floating tensors by name, the base's by default; values beyond their range are clamped.

    Methods that scan the model or need statistics have no place here. Raises `MergeError` for one, and else as
    `merge_stream` does.
    """
    require_agreement(base, experts)
    keep_pages()
    chosen = list(base if names is None else names)
    inputs = Inputs(base, experts, torch.device(device), progress)
    for done, name in enumerate(chosen, 1):
        stored = inputs.stored(name)
        yield name, _merged(name, stored, inputs, way, (dtypes or {}).get(name))
        if progress:
            progress("merge", done, len(chosen))


def _merged(name: str, stored: Tensor, inputs: Inputs, way: Callable[[str], Way], dtype: torch.dtype | None) -> Tensor:
    if not stored.is_floating_point():
        for _ in inputs.parts(name, stored):  # compares shapes and kinds
            pass
        return stored.clone(memory_format=torch.contiguous_format)
    own = way(name)
    anchor, count = own.anchor, len(inputs.experts)
    weights = torch.tensor([float(a) for a in own.weights], dtype=torch.float64, device=inputs.device)  # (T,)
    if anchor.scan or anchor.needs:
        raise MergeError(f"anchor {anchor.name} looks at more than one tensor", "use it over the whole model")
    inside = replace(inputs, pieces=anchor.elementwise)
    job = Job(anchor, own.knobs, inside, weights, range(count), count, Statistics(), frozenset(), dtype)
    return job.merged(name, inside.stored(name), 0.0, own.scale, None)
