"""What a merge reads: a base and T experts that agree, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MergeError
from ..linalg import require_finite
from ..notation import Tensors

Progress = Callable[[str, int, int], None]
"""Called after every tensor with (phase, tensors done, tensors in all); phases: "scan 1", "scan 2" ..., "merge"."""

LARGE = 1e12
"""Tensors with entries beyond this are merged in float64: the squares and sums of kernels then stay finite."""


@dataclass
class Inputs:
    """Base and experts, read one tensor at a time; iterating is one scan over the floating tensors."""

    base: Tensors
    experts: Sequence[Tensors]
    device: torch.device
    progress: Progress | None
    scans: int = 0

    def read(self, name: str) -> tuple[Tensor, Tensor, Tensor] | Tensor:
        """(stored, w0, taus) of a floating tensor, or the base's tensor alone where it holds integers.

        ``stored`` is the base's tensor as it is; ``w0`` (*shape) and ``taus`` (T, *shape) are float32, or float64 where
        an input is float64 or holds entries beyond `LARGE`.
        """
        stored = self.base[name].detach()
        if stored.is_complex():
            raise MergeError(f"{name} is {_describe(stored)}", "merge real tensors only")
        if not stored.is_floating_point():
            for t, expert in enumerate(self.experts):
                _require_like(name, stored, expert[name], t)
            return stored
        w0 = _widen(stored.to(self.device))
        require_finite(f"{name} of the base", w0)
        taus = w0.new_empty(len(self.experts), *w0.shape)  # (T, *shape)
        for t, expert in enumerate(self.experts):
            raw = expert[name].detach()
            _require_like(name, stored, raw, t)
            wt = _widen(raw.to(self.device))
            require_finite(f"{name} of experts[{t}]", wt)
            if wt.dtype != taus.dtype:
                w0, wt, taus = w0.double(), wt.double(), taus.double()
            taus[t] = wt - w0
        return stored, w0, taus

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, _, taus in self.walk():
            yield name, taus

    def walk(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """One scan, as (name, w0, taus) of every floating tensor that is not empty."""
        self.scans += 1
        phase = f"scan {self.scans}"
        for done, name in enumerate(self.base, 1):
            tensors = self.read(name)
            if not isinstance(tensors, Tensor) and tensors[0].numel():
                yield name, tensors[1], tensors[2]
            if self.progress:
                self.progress(phase, done, len(self.base))


def _widen(tensor: Tensor) -> Tensor:
    """The tensor in the dtype its arithmetic is done in."""
    wide = tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
    if wide.numel() and wide.dtype != torch.float64 and bool(wide.abs().amax() > LARGE):
        return wide.double()
    return wide


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _alike(a: Tensor, b: Tensor) -> bool:
    same_kind = a.is_floating_point() == b.is_floating_point() and a.is_complex() == b.is_complex()
    return a.shape == b.shape and same_kind


def _require_like(name: str, base: Tensor, expert: Tensor, t: int, others: Collection[str] = ()) -> None:
    if not _alike(base, expert):
        too = f"; {first_names(others)} differ too" if others else ""
        raise MergeError(
            f"{name} is {_describe(base)} in the base but {_describe(expert)} in experts[{t}]{too}",
            "merge experts fine-tuned from this base; leave task heads out of base and experts alike",
        )


def first_names(names: Collection[str], shown: int = 3) -> str:
    head = ", ".join(sorted(names)[:shown])
    return head if len(names) <= shown else f"{head} and {len(names) - shown} more"


def require_agreement(base: Tensors, experts: Sequence[Tensors]) -> None:
    """Same names everywhere; same shapes and kinds where looking costs nothing, the others as they are read."""
    if isinstance(experts, Mapping) or not isinstance(experts, Sequence):
        raise MergeError("experts must be a list of state dicts", "write [expert] for a single one")
    if not experts:
        raise MergeError("there is no expert to merge", "give at least one")
    if not base:
        raise MergeError("the base holds no tensors", "give the state dict of the model the experts start from")
    names = set(base)
    for t, expert in enumerate(experts):
        hint = "base and experts must have the same parameters; leave task heads out of all of them"
        if missing := names - set(expert):
            raise MergeError(f"experts[{t}] lacks {first_names(missing)}", hint)
        if extra := set(expert) - names:
            raise MergeError(f"experts[{t}] has {first_names(extra)}, which the base lacks", hint)
        if isinstance(base, dict) and isinstance(expert, dict):
            wrong = [name for name in base if not _alike(base[name], expert[name])]
            if wrong:
                _require_like(wrong[0], base[wrong[0]], expert[wrong[0]], t, wrong[1:])


def shared_storage(base: Tensors, experts: Sequence[Tensors]) -> dict[str, str]:
    """Name -> earlier name with which it shares its storage, in the base and in every expert (in-memory models only).

    Such tensors are one parameter: it must not come out as two, nor count twice.
    """
    if not all(isinstance(model, dict) for model in (base, *experts)):
        return {}
    first: dict[tuple[object, ...], str] = {}
    tied = {}
    for name in base:
        tensors = [model[name] for model in (base, *experts)]
        if tensors[0].numel():
            key = tuple((w.data_ptr(), w.shape, w.stride(), w.dtype, w.device) for w in tensors)
            if (earlier := first.setdefault(key, name)) != name:
                tied[name] = earlier
    return tied
