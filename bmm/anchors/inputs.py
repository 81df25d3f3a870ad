"""What a merge reads: a base and T experts that agree, one tensor at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..checkpoint.agreement import on_disk
from ..checkpoint.staging import Staged, Staging, all_on_disk, apart
from ..errors import MergeError
from ..linalg import largest, require_finite
from ..notation import Tensors

Progress = Callable[[str, int, int], None]
"""Called after every tensor with (phase, tensors done, tensors in all); phases: "scan 1", "scan 2" ..., "merge"."""

LARGE = 1e12
"""Tensors with entries beyond this are merged in float64: the squares and sums of kernels then stay finite."""

PIECE = 1 << 17
"""Entries of a tensor that an elementwise method takes at a time: all T experts' then fit a processor's cache."""

DEVICE_PIECE = 32 * PIECE
"""The same on another device than the processor, which is slow to start anything; a multiple of what DARE draws by."""

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
    staging: Staging | None = None  # what `staged` reads ahead

    def stored(self, name: str) -> Tensor:
        """The base's tensor as it is; `MergeError` for complex numbers.

        A large one that will be read from disk in pieces is not read here, nor one that is staged: a tensor on the meta
        device stands for it.
        """
        found = on_disk(self.base, name) if self.pieces or self.staging else None
        base = _outline(*found) if found else self.base[name].detach()
        if found and not (self.cuts(base) or (self.staging and base.is_floating_point() and base.numel())):
            base = self.base[name].detach()
        if base.is_complex():
            raise MergeError(f"{name} is {_describe(base)}", "merge real tensors only")
        return base

    def cuts(self, base: Tensor) -> bool:
        """Whether `parts` hands this tensor of the base out in pieces."""
        return self.pieces and base.is_floating_point() and base.numel() > self._piece

    @property
    def _piece(self) -> int:
        return PIECE if self.device.type == "cpu" else DEVICE_PIECE

    def _places(self, base: Tensor) -> Iterator[slice]:
        """The parts that a tensor of the base is handed out in, as slices of the flattened one."""
        size = base.numel()
        step = self._piece if self.cuts(base) else max(size, 1)
        return (slice(start, min(start + step, size)) for start in range(0, size, step))

    def parts(self, name: str, base: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(where, w0, taus) of the tensor that is ``base`` in the base: of a large one, if in pieces, by flat pieces
        w0 (n,) and taus (T, n); of others once, as w0 (*shape) and taus (T, *shape).

        They are float32, or float64 where an input is float64 or holds entries beyond `LARGE`. Tensors without floating
        entries are compared in shape and kind, and have no parts.
        """
        if not base.is_floating_point() or not base.numel():
            for _ in self._of_experts(name, base):
                pass
            return
        plain, cut, read = True, self.cuts(base), self._reader(name, base)
        for where in self._places(base):
            w0, taus = self._widened(name, read(where))
            plain = plain and taus.dtype == torch.float32
            yield where, w0, taus
        if plain and cut:
            self._plain.add(name)

    def _reader(self, name: str, base: Tensor) -> Callable[[slice], Iterator[Staged]]:
        """What gives the entries of base and experts that a slice asks for, whole tensors where they are not cut."""
        if self.staging:
            for t, expert in enumerate(self.experts):
                found = on_disk(expert, name)
                _require_like(name, base, _outline(*found) if found else expert[name], t)
            staging, cut = self.staging, self.cuts(base)
            return lambda where: iter(staging.take(name, where if cut else None))
        if not self.cuts(base):
            return lambda where: (self._known(name, raw) for raw in (base, *self._of_experts(name, base)))
        before = self._pieces_of(self.base, name, base) if base.is_meta else base.reshape(-1).__getitem__
        readers = [before, *(self._pieces_of(expert, name, base, t) for t, expert in enumerate(self.experts))]
        return lambda where: (self._known(name, read(where)) for read in readers)

    def _known(self, name: str, raw: Tensor) -> Staged:
        """A tensor on the device, with its extreme, which of one that was seen before is not looked for again."""
        return Staged(raw.to(self.device), 0.0 if name in self._plain else largest(raw))

    def _pieces_of(self, model: Tensors, name: str, base: Tensor, t: int = 0) -> Callable[[slice], Tensor]:
        """What gives the entries of a flattened tensor that a slice asks for; from disk, reads no others."""
        if found := on_disk(model, name):
            checkpoint, stored = found
            _require_like(name, base, _outline(checkpoint, stored), t)
            return _Ahead(checkpoint, stored, base.numel())
        raw = model[name].detach()
        _require_like(name, base, raw, t)
        return raw.reshape(-1).__getitem__

    @contextlib.contextmanager
    def staged(self, names: Iterable[str]) -> Iterator[None]:
        """Read the parts of these tensors ahead, in this order, where the device computes meanwhile."""
        order, models = list(names), (self.base, *self.experts)
        if not apart(self.device) or not all_on_disk(models, order):
            yield
            return
        outlines = {name: _outline(*found) for name in order if (found := on_disk(self.base, name))}
        wanted = (
            (name, where if self.cuts(base) else None)
            for name, base in outlines.items()
            if base.is_floating_point()
            for where in self._places(base)
        )
        self.staging = Staging(models, wanted, self.device)
        try:
            yield
        finally:
            self.staging.close()
            self.staging = None

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

    def _widened(self, name: str, raws: Iterator[Staged]) -> tuple[Tensor, Tensor]:
        """w0 (*shape) and taus (T, *shape) of base and experts, checked for NaN and Inf."""
        w0 = _widen(next(raws), f"{name} of the base")
        taus = w0.new_empty(len(self.experts), *w0.shape)  # (T, *shape)
        for t, raw in enumerate(raws):
            wt = _widen(raw, f"{name} of experts[{t}]")
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
        with self.staged(self.base):
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


def _widen(raw: Staged, label: str) -> Tensor:
    """The tensor in the dtype its arithmetic is done in; `MergeError` naming ``label`` where it holds NaN or Inf."""
    tensor, extreme = raw
    wide = tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
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
