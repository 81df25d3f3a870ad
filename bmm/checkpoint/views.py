"""A checkpoint seen otherwise: some of its tensors replaced, left out, or with their rows in another order."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .formats import TensorFile, TensorInfo
from .low_rank import Change, Stored
from .reader import Checkpoint

RUNS = 256  # more separate pieces than this, and a tensor is read whole


class View(Checkpoint):
    """``inner`` with other holders of some tensors, those of ``others`` among them; ``salt`` says what was done to it,
    for the fingerprint. ``config`` and ``replaced`` (file name -> content) stand for the files that no longer fit."""

    def __init__(
        self, inner: Checkpoint, holders: Mapping[str, TensorFile], salt: Sequence[object],
        others: Sequence[Checkpoint], config: Mapping[str, object] | None = None,
        replaced: Mapping[str, bytes] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(inner.path, holders, inner.skipped)
        self.inner = inner
        self.notices = inner.notices
        self.replaced_files = {**inner.replaced_files, **(replaced or {})}
        self._salt, self._others, self._config = list(salt), list(others), config

    @property
    def config(self) -> dict[str, object]:
        """The inner checkpoint's config.json, or the one that replaces it."""
        return dict(self.inner.config if self._config is None else self._config)

    @property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """The inner checkpoint's ties, of the names still there."""
        kept = (tuple(name for name in group if name in self) for group in self.inner.tied)
        return tuple(group for group in kept if len(group) > 1)

    @cached_property
    def _fingerprint(self) -> str:
        prints = [source.fingerprint() for source in (self.inner, *self._others)]
        said = json.dumps([self._salt, list(self.names)])
        return hashlib.sha256("\n".join(["bmm view 1", *prints, said]).encode()).hexdigest()

    def side_files(self) -> list[Path]:
        """The inner checkpoint's."""
        return self.inner.side_files()


@dataclass(frozen=True)
class Reordered:
    """Rows of a tensor by number, -1 for those of ``fallback``; both have rows of ``width`` entries."""

    own: Stored
    rows: Tensor  # (n,)
    fallback: Change
    shape: tuple[int, ...]

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.shape, torch.promote_types(self.own.info.dtype, self.fallback.info.dtype))

    @property
    def width(self) -> int:
        return self.info.numel // max(len(self.rows), 1)

    def piece(self, start: int, stop: int) -> Tensor:
        width = self.width
        first, last = start // width, -(-stop // width)
        wanted = self.rows[first:last]
        if bool((wanted < 0).any()):
            out = self.fallback.piece(first * width, last * width).to(self.info.dtype).view(-1, width)
        else:
            out = torch.empty(last - first, width, dtype=self.info.dtype)
        known = (wanted >= 0).nonzero().flatten()
        self._fill(out, known, wanted[known])
        return out.reshape(-1)[start - first * width : stop - first * width].clone()

    def described(self) -> list[object]:
        return ["rows", hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()]

    def _fill(self, out: Tensor, places: Tensor, rows: Tensor) -> None:
        """Put the given rows of the own tensor into their places of ``out``, in runs that lie together in both."""
        if not len(rows):
            return
        breaks = ((rows.diff() != 1) | (places.diff() != 1)).nonzero().flatten() + 1
        edges = [0, *breaks.tolist(), len(rows)]
        if len(edges) > RUNS:
            out[places] = self.own.read().reshape(-1, self.width)[rows].to(out.dtype)
            return
        for begin, end in itertools.pairwise(edges):
            first, place, count = int(rows[begin]), int(places[begin]), end - begin
            piece = self.own.piece(first * self.width, (first + count) * self.width)
            out[place : place + count] = piece.view(count, self.width).to(out.dtype)


@dataclass(frozen=True)
class Extended:
    """A tensor with rows put in at given places, each the mean of rows of other tensors; in its own dtype."""

    own: Stored
    new: Mapping[int, Sequence[tuple[Stored, int]]]
    shape: tuple[int, ...]

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.shape, self.own.info.dtype)

    def piece(self, start: int, stop: int) -> Tensor:
        size = self.own.info.numel
        out = torch.zeros(stop - start, dtype=self.info.dtype)
        if start < size:
            out[: min(stop, size) - start] = self.own.piece(start, min(stop, size))
        width = self._width
        for row, sources in self.new.items():
            begin, end = max(row * width, start), min((row + 1) * width, stop)
            if begin < end:
                offset = begin - row * width
                pieces = [s.piece(r * width + offset, r * width + offset + end - begin).float() for s, r in sources]
                out[begin - start : end - start] = torch.stack(pieces).mean(0).to(out.dtype)
        return out

    def described(self) -> list[object]:
        return ["extended", [[row, [r for _, r in sources]] for row, sources in sorted(self.new.items())]]

    @property
    def _width(self) -> int:
        """Entries of a row."""
        rows = max(self.shape[0], self.shape[1] if self.shape[0] == 1 and len(self.shape) > 1 else 0)
        return self.info.numel // rows
