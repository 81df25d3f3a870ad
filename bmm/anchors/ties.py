"""TIES: trim each task vector, elect a sign per coordinate, merge the entries that agree with it.

Three things are decided over the whole model and found by `scan_ties` before any tensor is merged:

    k          = max(1, round(density * number of parameters))
    cut_t      = the k-th largest |entry| of task vector t, over all parameters
    majority   = sign of (coordinates elected positive - coordinates elected negative)

``cut_t`` is exact and takes memory for 65,536 counters a task, whatever the size of the model: the bit patterns of
non-negative float32 numbers sort as the numbers do, so counting the upper 15 bits in one pass and the lower 16 bits of
the bin that holds the k-th value in a second one is a two-digit radix selection. A third pass, when the cuts are known,
finds the majority. Selecting exactly in a single pass would need memory for k entries of every expert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from ..errors import MergeError
from .anchor import Context, TaskVectors, Whole, scaled

LOW_BITS = 16
HIGH_BINS = 1 << 15  # sign bit aside, a float32 has 31 bits
LOW_BINS = 1 << LOW_BITS


@dataclass(frozen=True)
class TiesState:
    """``cuts``: the smallest magnitude that survives trimming, one a task. ``majority``: +1, -1, or 0 for a draw."""

    cuts: tuple[float, ...]
    majority: int


def scan_ties(stream: TaskVectors, knobs: Mapping[str, Any], whole: Whole) -> TiesState:
    """The cuts for ``knobs["density"]`` and the majority sign of the model; see the head of this file.

    Three passes over ``stream``, one where density is 1 and there is nothing to cut.
    """
    cuts = global_cuts(stream, knobs["density"]) if knobs["density"] < 1 else None
    balance = 0
    for _, taus in stream:
        balance += int(elect(scaled(trim(taus, cuts) if cuts else taus, whole.weights)).sum())
    return TiesState(cuts or (), (balance > 0) - (balance < 0))


def global_cuts(stream: TaskVectors, density: float) -> tuple[float, ...]:
    """The k-th largest magnitude of each task vector, k = max(1, round(density * parameters)), in two passes.

    Magnitudes are ranked as float32, the precision task vectors have.
    """
    high = torch.zeros(0, HIGH_BINS, dtype=torch.int64)
    for _, taus in stream:
        patterns = _patterns(taus)  # (T, n)
        if not len(high):
            high = high.new_zeros(len(patterns), HIGH_BINS)
        for t, pattern in enumerate(patterns):
            high[t] += torch.bincount(pattern >> LOW_BITS, minlength=HIGH_BINS).cpu()
    if not len(high):
        raise MergeError("the base holds no floating-point tensor", "give a checkpoint with weights")
    k = max(1, round(density * int(high[0].sum())))
    bins, ranks = zip(*(_kth_bin(counts, k) for counts in high), strict=True)

    low, one = torch.zeros(len(bins), LOW_BINS, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    for _, taus in stream:
        for t, pattern in enumerate(_patterns(taus)):
            numbers = pattern.cpu().numpy()  # NumPy picks by mask five times faster
            inside = torch.from_numpy(numbers[(numbers >> LOW_BITS) == bins[t]] & (LOW_BINS - 1))
            low[t].index_add_(0, inside, one.expand(len(inside)))
    digits = [_kth_bin(counts, rank)[0] for counts, rank in zip(low, ranks, strict=True)]
    cuts = torch.tensor([(b << LOW_BITS) | d for b, d in zip(bins, digits, strict=True)], dtype=torch.int32)
    return tuple(cuts.view(torch.float32).tolist())


def _patterns(taus: Tensor) -> Tensor:
    """Magnitudes as integers that sort alike, (T, n)."""
    return taus.reshape(len(taus), -1).abs().to(torch.float32).view(torch.int32)


def _kth_bin(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest of the counted values, and that value's rank (from 1) within the bin."""
    above = counts.flip(0).cumsum(0)  # values in the top 1, 2, ... bins
    position = int(torch.searchsorted(above, k))
    before = int(above[position - 1]) if position else 0
    return len(counts) - 1 - position, k - before


def trim(taus: Tensor, cuts: tuple[float, ...]) -> Tensor:
    """Zero what is smaller than its task's cut. Entries equal to the cut all stay: no order decides between them."""
    if taus.dtype == torch.float32:  # one fused pass: hardshrink zeroes what is at most its bound
        below = torch.nextafter(torch.tensor(cuts), torch.tensor(-math.inf)).tolist()
        return torch.stack([hardshrink(tau, bound) for tau, bound in zip(taus, below, strict=True)])
    limits = torch.tensor(cuts, device=taus.device).view(-1, *[1] * (taus.dim() - 1))  # (T, 1, ...)
    return taus * (taus.abs().to(torch.float32) >= limits)


def elect(taus: Tensor) -> Tensor:
    """Sign of the sum over tasks, (*shape) in float64, 0 where they cancel.

    Summed in float64, where float32 entries add exactly: near-cancellations do not depend on the order of experts.
    """
    total = taus[0].to(torch.float64, copy=True)  # (*shape)
    for tau in taus[1:]:
        total += tau
    return total.sign_()


def ties(taus: Tensor, context: Context, *, density: float, reduce: Literal["mean", "sum"]) -> Tensor:
    """Trim, elect, merge (arXiv 2306.01708): ``taus`` (T, *shape) -> (*shape).

    ``reduce`` "mean" divides by the number of entries that agree, "sum" does not and wants a smaller scale. Coordinates
    whose trimmed entries cancel take the majority sign of the model, and stay at the base where that is a draw.
    Task weights multiply the trimmed task vectors; the mean then divides by the sum of ``|a_t|`` over what agrees.
    One expert at density 1 gives that expert.
    """
    state: TiesState = context.state
    kept = scaled(trim(taus, state.cuts) if density < 1 else taus, context.weights)  # (T, *shape)
    elected = elect(kept)  # (*shape)
    elected = elected.add_(0.5 * state.majority).sign_().to(taus.dtype)  # only a 0 is turned
    along = (kept * elected).clamp_(min=0)  # (T, *shape), the sizes of the entries that agree
    total = _sum(along)  # (*shape); of one sign, so that no digit cancels
    if reduce == "mean":
        count = _sum(scaled(along.sign_(), context.weights.abs()))  # (*shape)
        total /= count.clamp_(min=torch.finfo(count.dtype).tiny)  # where nothing agrees the total is 0
    return total.mul_(elected)


def _sum(taus: Tensor) -> Tensor:
    """Sum over tasks (*shape), by adding whole tensors: a reduction over the first dimension is slower."""
    total = taus[0].clone()
    for tau in taus[1:]:
        total += tau
    return total
