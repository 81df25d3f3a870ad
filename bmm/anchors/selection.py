"""Exact order statistics of numbers too many to hold: a two-digit radix selection over float32 bit patterns.

The bits of a float32, those of negative numbers turned around, sort as the numbers do. One pass counts the upper 16
bits; a second one counts the lower 16 bits of what falls into the bins that hold the wanted ranks. Memory is 65,536
counters a task and rank, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..errors import MergeError

BITS = 16
BINS = 1 << BITS

Rows = Iterable[Iterable[Tensor]]
"""For every tensor of a model T flat tensors of numbers, one a task; each new iteration is one more pass."""


def order_statistics(rows: Rows, ranks: Callable[[int], Sequence[int]]) -> Tensor:
    """The k-th largest number of every task over the whole model, (T, R) float32, in two passes.

    ``ranks`` gives the R ranks k, from 1 (the largest), for the number n of entries a task has. Numbers are ranked as
    float32.
    """
    high: list[Tensor] = []
    for values in rows:
        for t, row in enumerate(values):
            if t == len(high):
                high.append(torch.zeros(BINS, dtype=torch.int64))
            high[t] += torch.bincount((_sortable(row) >> BITS) + BINS // 2, minlength=BINS).cpu()
    if not high:
        raise MergeError("the base holds no floating-point tensor", "give a checkpoint with weights")
    wanted = ranks(int(high[0].sum()))
    found = [[_kth_bin(counts, k) for k in wanted] for counts in high]  # T lists of (bin, rank inside it)

    low, one = torch.zeros(len(high), len(wanted), BINS, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    for values in rows:
        for t, row in enumerate(values):
            numbers = _sortable(row).cpu().numpy()  # NumPy picks by mask five times faster
            upper = numbers >> BITS
            for r, (position, _) in enumerate(found[t]):
                inside = torch.from_numpy(numbers[upper == position - BINS // 2] & (BINS - 1))
                low[t, r].index_add_(0, inside, one.expand(len(inside)))
    digits = [[_kth_bin(low[t, r], rank)[0] for r, (_, rank) in enumerate(line)] for t, line in enumerate(found)]
    keys = torch.tensor(
        [[(b - BINS // 2 << BITS) | d for (b, _), d in zip(line, ds, strict=True)]
         for line, ds in zip(found, digits, strict=True)],
        dtype=torch.int32,
    )  # fmt: skip
    return _turn(keys).view(torch.float32)  # (T, R)


def _sortable(row: Tensor) -> Tensor:
    """Numbers as 32-bit integers that sort alike, (n,)."""
    return _turn(row.reshape(-1).to(torch.float32).view(torch.int32))


def _turn(bits: Tensor) -> Tensor:
    """Bits of float32 to sortable integers, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _kth_bin(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest of the counted values, and that value's rank (from 1) within the bin."""
    above = counts.flip(0).cumsum(0)  # values in the top 1, 2, ... bins
    position = int(torch.searchsorted(above, k))
    before = int(above[position - 1]) if position else 0
    return len(counts) - 1 - position, k - before
