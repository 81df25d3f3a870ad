"""From T experts to `MaskedModels`: one pass that finds masks and rescalers (see `masked` for what they are)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import MergeError
from ..notation import StateDict, Tensors
from .consensus import merged_total, tall_masks
from .emr import agreement_masks, unify
from .inputs import Inputs, Progress, require_agreement, shared_storage
from .masked import MaskedModels
from .registry import get
from .streaming import checked_weights

Unify = Callable[[Tensor], Tensor]
"""Task vectors (T, *shape) -> unified task vector (*shape)."""


def emr_compress(
    base: Tensors,
    experts: Sequence[Tensors],
    tasks: Sequence[str] | None = None,
    *,
    weights: Sequence[float] | None = None,
    tied: Mapping[str, str] | None = None,
    device: str | torch.device = "cpu",
    lazy: bool = False,
    progress: Progress | None = None,
) -> MaskedModels:
    """EMR's unified vector, masks and rescalers (arXiv 2405.17461).

    Parameters
    ----------
    tasks : T names, "expert1", "expert2" ... by default.
    weights : task weights a_t of the election, 1 by default; negative ones vote against their task. Masks and rescalers
        are those of the task vectors themselves.
    tied : name -> earlier name that is the same parameter, found by shared memory where not given.
    device : where the arithmetic runs; results lie on the CPU.
    lazy : keep the experts and compute each tensor of the unified vector when it is read: for experts on disk.
    progress : see `bmm.anchors.Progress`, phase "merge".

    Raises `MergeError` as `bmm.anchors.merge_stream` does.

    >>> masked = emr_compress(base, [a, b], ["cars", "dogs"])
    >>> cars = masked.reconstruct("cars")
    """
    a = checked_weights(get("emr"), weights, len(experts)).to(device)
    work = _Work(base, experts, tasks, tied, torch.device(device), progress, lambda taus: unify(taus, a))
    return work.compress("emr", agreement_masks, rescale=True, lazy=lazy)


def tall_compress(
    base: Tensors,
    experts: Sequence[Tensors],
    tasks: Sequence[str] | None = None,
    *,
    mask_strength: float | Sequence[float] = 0.4,
    weights: Sequence[float] | None = None,
    tied: Mapping[str, str] | None = None,
    device: str | torch.device = "cpu",
    lazy: bool = False,
    progress: Progress | None = None,
) -> MaskedModels:
    """TALL masks over the sum of task vectors (arXiv 2405.07813, section 3).

    ``mask_strength`` is lambda, or one lambda_t a task, which the paper picks on validation data from 0.2 to 0.6; the
    rest as in `emr_compress`, the weights being those of the sum.
    """
    a = checked_weights(get("consensus_ta"), weights, len(experts)).to(device)
    strengths = list(mask_strength) if isinstance(mask_strength, Sequence) else [mask_strength] * len(experts)
    if len(strengths) != len(experts) or not all(0 <= s < float("inf") for s in strengths):
        raise MergeError(f"mask_strength {mask_strength}", "give one number >= 0, or one a task")
    strength = torch.tensor(strengths, dtype=torch.float64)
    work = _Work(base, experts, tasks, tied, torch.device(device), progress, lambda taus: merged_total(taus, a))
    return work.compress("tall", lambda taus, total: tall_masks(taus, total, strength), rescale=False, lazy=lazy)


class _Work:
    """Base and experts, checked, and how they are unified."""

    def __init__(
        self,
        base: Tensors,
        experts: Sequence[Tensors],
        tasks: Sequence[str] | None,
        tied: Mapping[str, str] | None,
        device: torch.device,
        progress: Progress | None,
        unify: Unify,
    ) -> None:
        require_agreement(base, experts)
        self.tasks = tuple(tasks) if tasks is not None else tuple(f"expert{t + 1}" for t in range(len(experts)))
        if len(self.tasks) != len(experts) or len(set(self.tasks)) != len(experts):
            raise MergeError(f"task names {list(self.tasks)} for {len(experts)} experts", "give each its own name")
        self.tied = dict(tied) if tied is not None else shared_storage(base, experts)
        self.inputs = Inputs(base, experts, device, progress)
        self.unify = unify

    def compress(
        self, method: str, masks_of: Callable[[Tensor, Tensor], Tensor], *, rescale: bool, lazy: bool
    ) -> MaskedModels:
        """One pass over the experts. Held at the end: T bits a parameter, and unless ``lazy`` the unified vector."""
        base, tasks = self.inputs.base, len(self.tasks)
        masks: StateDict = {}
        vector: StateDict = {}
        own, shared = torch.zeros(tasks, dtype=torch.float64), torch.zeros(tasks, dtype=torch.float64)
        for done, name in enumerate(base, 1):
            tensors = None if name in self.tied else self.inputs.read(name)
            if tensors is not None and not isinstance(tensors, Tensor) and tensors[0].numel():
                taus = tensors[2]  # (T, *shape)
                unified = self.unify(taus)  # (*shape)
                inside = masks_of(taus, unified).reshape(tasks, -1)  # (T, n)
                masks[name] = torch.from_numpy(np.packbits(inside.cpu().numpy(), axis=1))  # (T, ceil(n / 8))
                if not lazy:
                    vector[name] = unified.cpu()
                sizes = unified.abs().double().reshape(-1)  # (n,)
                own += torch.stack([tau.abs().sum(dtype=torch.float64) for tau in taus]).cpu()
                shared += torch.stack([sizes[kept].sum() for kept in inside]).cpu()
            if self.inputs.progress:
                self.inputs.progress("merge", done, len(base))
        # a mask that is empty everywhere rescales nothing
        ratios = own / shared if rescale else torch.ones_like(own)
        rescalers = tuple(ratios.where(shared > 0, torch.ones_like(ratios)).tolist())
        chosen: Tensors = _Unified(self.inputs, self.unify, masks) if lazy else vector
        return MaskedModels(method, self.tasks, base, chosen, masks, rescalers, self.tied)


class _Unified(Mapping[str, Tensor]):
    """The unified task vector, computed from the experts tensor by tensor as it is read."""

    def __init__(self, inputs: Inputs, unify: Unify, names: Iterable[str]) -> None:
        self._inputs, self._unify, self._names = inputs, unify, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensors = self._inputs.read(name)
        assert not isinstance(tensors, Tensor)
        return self._unify(tensors[2]).cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
