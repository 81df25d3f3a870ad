"""What a merge reads: a base and T experts that agree, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..checkpoint.agreement import on_disk
from ..errors import MergeError
from ..linalg import largest, require_finite
from ..notation import Tensors

Progress = Callable[[str, int, int], None]
"""Called after every tensor with (phase, tensors done, tensors in all); phases: "scan 1", "scan 2" ..., "merge"."""

LARGE = 1e12
"""Tensors with entries beyond this are merged in float64: the squares and sums of kernels then stay finite."""

PIECE = 1 << 17
"""Entries of a tensor that an elementwise method takes at a time: all T experts' then fit a processor's cache."""

AHEAD = 4
"""Pieces that are read from disk at once."""


@dataclass
class Inputs:
    """Base and experts, read one tensor at a time; iterating is one scan over the floating tensors.

    ``pieces``: large tensors are widened and handed out in flat pieces of `PIECE` entries.
    """

    base: Tensors
    experts: Sequence[Tensors]
    device: torch.device
    progress: Progress | None
    pieces: bool = False
    scans: int = 0
    _plain: set[str] = field(default_factory=set)  # tensors in pieces, gone through and found finite and not `LARGE`

    def stored(self, name: str) -> Tensor:
        """The base's tensor as it is; `MergeError` for complex numbers.

        A large one that will be read from disk in pieces is not read here: a tensor on the meta device stands for it.
        """
        found = on_disk(self.base, name) if self.pieces else None
        base = _outline(*found) if found else self.base[name].detach()
        if found and not self.cuts(base):
            base = self.base[name].detach()
        if base.is_complex():
            raise MergeError(f"{name} is {_describe(base)}", "merge real tensors only")
        return base

    def cuts(self, base: Tensor) -> bool:
        """Whether `parts` hands this tensor of the base out in pieces."""
        return self.pieces and base.is_floating_point() and base.numel() > PIECE

    def parts(self, name: str, base: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(where, w0, taus) of the tensor that is ``base`` in the base: of a large one, if in pieces, by flat pieces
        w0 (n,) and taus (T, n); of others once, as w0 (*shape) and taus (T, *shape).

        They are float32, or float64 where an input is float64 or holds entries beyond `LARGE`. Tensors without floating
        entries are compared in shape and kind, and have no parts.
        """
        size = base.numel()
        if not base.is_floating_point() or not size:
            for _ in self._of_experts(name, base):
                pass
        elif not self.cuts(base):
            yield slice(0, size), *self._widened(name, base, self._of_experts(name, base))
        else:
            before = self._pieces_of(self.base, name, base) if base.is_meta else base.reshape(-1).__getitem__
            after = [self._pieces_of(expert, name, base, t) for t, expert in enumerate(self.experts)]
            plain = True
            for start in range(0, size, PIECE):
                where = slice(start, min(start + PIECE, size))
                w0, taus = self._widened(name, before(where), (piece(where) for piece in after))
                plain = plain and taus.dtype == torch.float32
                yield where, w0, taus
            if plain:
                self._plain.add(name)

    def _pieces_of(self, model: Tensors, name: str, base: Tensor, t: int = 0) -> Callable[[slice], Tensor]:
        """What gives the entries of a flattened tensor that a slice asks for; from disk, reads no others."""
        if found := on_disk(model, name):
            checkpoint, stored = found
            _require_like(name, base, _outline(checkpoint, stored), t)
            return _Ahead(checkpoint, stored, base.numel())
        raw = model[name].detach()
        _require_like(name, base, raw, t)
        return raw.reshape(-1).__getitem__

    def read(self, name: str) -> tuple[Tensor, Tensor, Tensor] | Tensor:
        """(stored, w0 (*shape), taus (T, *shape)) of a whole tensor, or the base's alone where there is no entry to
        merge; see `parts`."""
        stored = self.stored(name)
        for _, w0, taus in replace(self, pieces=False).parts(name, stored):
            return stored, w0, taus
        return stored

    def _of_experts(self, name: str, base: Tensor) -> Iterator[Tensor]:
        for t, expert in enumerate(self.experts):
            raw = expert[name].detach()
            _require_like(name, base, raw, t)
            yield raw

    def _widened(self, name: str, base: Tensor, experts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """w0 (*shape) and taus (T, *shape) on the device, checked for NaN and Inf."""
        known = name in self._plain
        w0 = _widen(base.to(self.device), f"{name} of the base", known)
        taus = w0.new_empty(len(self.experts), *w0.shape)  # (T, *shape)
        for t, raw in enumerate(experts):
            wt = _widen(raw.to(self.device), f"{name} of experts[{t}]", known)
            if wt.dtype != taus.dtype:
                w0, wt, taus = w0.double(), wt.double(), taus.double()
            torch.sub(wt, w0, out=taus[t])
        return w0, taus

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, stored in self.tensors():
            for _, _, taus in self.parts(name, stored):
                yield name, taus

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """One scan, as (name, what `stored` gives) of every tensor."""
        self.scans += 1
        phase = f"scan {self.scans}"
        for done, name in enumerate(self.base, 1):
            yield name, self.stored(name)
            if self.progress:
                self.progress(phase, done, len(self.base))


def _outline(checkpoint: Checkpoint, name: str) -> Tensor:
    """Shape and dtype of a tensor on disk."""
    info = checkpoint.info(name)
    return torch.empty(info.shape, dtype=info.dtype, device="meta")


@dataclass
class _Ahead:
    """The entries of a flattened tensor on disk that a slice asks for, read `AHEAD` pieces at once.

    What is narrower than float32 is read into the same memory again and again, which stays in the processor's cache: it
    is copied when it is widened.
    """

    checkpoint: Checkpoint
    name: str
    size: int
    start: int = 0
    block: Tensor = field(default_factory=lambda: torch.empty(0))  # what was read last
    memory: Tensor = field(default_factory=lambda: torch.empty(0))

    def __call__(self, where: slice) -> Tensor:
        if not self.start <= where.start < where.stop <= self.start + self.block.numel():
            stop = min(max(where.stop, where.start + AHEAD * PIECE), self.size)
            self.start, self.block = where.start, self._room(stop - where.start)
            self.checkpoint.fill(self.name, where.start, self.block)
        return self.block[where.start - self.start : where.stop - self.start]

    def _room(self, count: int) -> Tensor:
        dtype = self.checkpoint.info(self.name).dtype
        if self.memory.dtype != dtype or len(self.memory) < count or dtype.itemsize > 2:
            self.memory = torch.empty(count, dtype=dtype)
        return self.memory[:count]


def _widen(tensor: Tensor, label: str, known: bool = False) -> Tensor:
    """The tensor in the dtype its arithmetic is done in; `MergeError` naming ``label`` where it holds NaN or Inf.

    ``known``: it was looked at before, and is neither that nor `LARGE`.
    """
    wide = tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
    if known or not wide.numel():
        return wide
    extreme = largest(tensor)  # faster over the bytes as stored
    if not math.isfinite(extreme):
        require_finite(label, wide)
    return wide.double() if extreme > LARGE else wide


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
