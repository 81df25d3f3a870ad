"""What an adapter makes of one of the base's tensors, computed when it is read.

LoRA, arXiv 2106.09685: W0 + s B A. DoRA, arXiv 2402.09353: the same, its rows rescaled to learnt norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .formats import TensorFile, TensorInfo

CHUNK = 2**24  # entries computed at once where a whole tensor is gone through


class Change(Protocol):
    """One tensor as the adapter leaves it."""

    @property
    def info(self) -> TensorInfo: ...

    def piece(self, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` of the flattened tensor, (stop - start,), owned by the caller."""
        ...

    def described(self) -> list[object]:
        """What determines the values besides the base's and the adapter's own tensors, for fingerprints."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor of a file, under its own name there."""

    file: TensorFile
    name: str

    @property
    def info(self) -> TensorInfo:
        return self.file.infos[self.name]

    def read(self) -> Tensor:
        return self.file.read(self.name)

    def piece(self, start: int, stop: int) -> Tensor:
        return self.file.read_piece(self.name, start, stop)

    def described(self) -> list[object]:
        """A tensor that replaces the base's."""
        return ["full", self.name]


@dataclass(frozen=True)
class Factor:
    """One of the two factors as a matrix: flattened if it is a convolution's, turned where the weight lies turned."""

    source: Stored
    turned: bool = False

    def read(self, dtype: torch.dtype) -> Tensor:
        matrix = self.source.read().flatten(1).to(dtype)
        return matrix.mT if self.turned else matrix


class LowRank:
    """``W0 + scaling * left @ right``, with a DoRA ``magnitude`` rescaled along ``axis``; in float32 or better.

    W0 is (n, m) after flattening all but its first axis, left (n, r), right (r, m). The magnitude holds the norms that
    rows (``axis`` 1) or columns (``axis`` 0) are to have.
    """

    def __init__(
        self, w0: Stored, left: Factor, right: Factor, scaling: float, magnitude: Stored | None = None, axis: int = 1
    ) -> None:
        self.w0, self.scaling, self.axis = w0, scaling, axis
        self._left, self._right, self._magnitude = left, right, magnitude
        parts = (w0, left.source, right.source, *((magnitude,) if magnitude else ()))
        double = any(part.info.dtype == torch.float64 for part in parts)
        self.info = TensorInfo(w0.info.shape, torch.float64 if double else torch.float32)
        self._rows = w0.info.shape[0]
        self._columns = w0.info.numel // max(self._rows, 1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """left (n, r) and right (r, m)."""
        return self._left.read(self.info.dtype), self._right.read(self.info.dtype)

    def piece(self, start: int, stop: int) -> Tensor:
        if start >= stop:
            return torch.empty(0, dtype=self.info.dtype)
        first, last = start // self._columns, -(-stop // self._columns)
        rows = self._adapted(*self.factors(), first, last)  # (last - first, m)
        if self._magnitude is not None:
            magnitude = self._magnitude.read().flatten().to(rows)
            if self.axis == 1:
                rows *= (magnitude[first:last] / torch.linalg.vector_norm(rows, dim=1))[:, None]
            else:
                rows *= magnitude / self._norms
        flat, offset = rows.reshape(-1), first * self._columns
        piece = flat[start - offset : stop - offset]
        return piece if piece.numel() == flat.numel() else piece.clone()

    def described(self) -> list[object]:
        return ["low rank", self.scaling, self._left.source.name, self._right.source.name, self._left.turned, self.axis]

    def same_as(self, other: LowRank) -> bool:
        """Whether both are one product, without computing it."""
        ours, theirs = (*self.factors(), self.scaling), (*other.factors(), other.scaling)
        equal = all(torch.equal(a, b) for a, b in zip(ours[:2], theirs[:2], strict=True))
        return equal and ours[2] == theirs[2] and self._magnitude is None and other._magnitude is None

    def _adapted(self, left: Tensor, right: Tensor, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last`` before any rescaling, (last - first, m)."""
        flat = self.w0.piece(first * self._columns, last * self._columns)
        rows = flat.to(self.info.dtype).view(-1, self._columns)
        return rows.addmm_(left[first:last], right, alpha=self.scaling)

    @cached_property
    def _norms(self) -> Tensor:
        """Norms of the columns, (m,): they need all rows, and are kept."""
        step = max(CHUNK // self._columns, 1)
        squares = torch.zeros(self._columns, dtype=torch.float64)
        left, right = self.factors()
        for first in range(0, self._rows, step):
            rows = self._adapted(left, right, first, min(first + step, self._rows))
            squares += rows.double().square_().sum(0)
        return squares.sqrt().to(self.info.dtype)


@dataclass(frozen=True)
class Shifted:
    """A bias plus ``scaling`` times the bias of B."""

    b0: Stored
    shift: Stored
    scaling: float

    @property
    def info(self) -> TensorInfo:
        double = torch.float64 in (self.b0.info.dtype, self.shift.info.dtype)
        return TensorInfo(self.b0.info.shape, torch.float64 if double else torch.float32)

    def piece(self, start: int, stop: int) -> Tensor:
        shift = self.shift.piece(start, stop).to(self.info.dtype)
        return self.b0.piece(start, stop).to(self.info.dtype).add_(shift, alpha=self.scaling)

    def described(self) -> list[object]:
        return ["bias", self.scaling, self.shift.name]


@dataclass(frozen=True)
class Rows:
    """An embedding, some of whose rows are replaced: ``rows`` gives the numbers, ``values`` (len(rows), d) the rows."""

    w0: Stored
    rows: tuple[int, ...]
    values: Stored

    @property
    def info(self) -> TensorInfo:
        same = self.w0.info.dtype == self.values.info.dtype
        double = torch.float64 in (self.w0.info.dtype, self.values.info.dtype)
        wide = torch.float64 if double else torch.float32
        return TensorInfo(self.w0.info.shape, self.w0.info.dtype if same else wide)

    def piece(self, start: int, stop: int) -> Tensor:
        piece = self.w0.piece(start, stop).to(self.info.dtype)
        width, values = self.w0.info.shape[1], self.values.read().to(self.info.dtype)
        for row, value in zip(self.rows, values, strict=True):
            begin = max(row * width, start)
            end = min((row + 1) * width, stop)
            if begin < end:
                piece[begin - start : end - start] = value[begin - row * width : end - row * width]
        return piece

    def described(self) -> list[object]:
        return ["rows", list(self.rows), self.values.name]


class AdaptedFile:
    """A `TensorFile` of the base's tensors as an adapter leaves them, by the base's names."""

    ties: tuple[tuple[str, ...], ...] = ()

    def __init__(self, path: Path, changes: Mapping[str, Change]) -> None:
        self.path = path
        self.changes = dict(changes)
        self.infos = {name: change.info for name, change in changes.items()}

    def read(self, name: str) -> Tensor:
        info = self.infos[name]
        return self.changes[name].piece(0, info.numel).reshape(info.shape)

    def read_piece(self, name: str, start: int, stop: int) -> Tensor:
        return self.changes[name].piece(start, stop)

    def fill(self, name: str, start: int, out: Tensor) -> None:
        out.copy_(self.changes[name].piece(start, start + len(out)))
