"""TIES: trim each task vector, elect a sign per coordinate, merge the entries that agree with it.

Three things are decided over the whole model and found by `scan_ties` before any tensor is merged:

    k          = max(1, round(density * number of parameters))
    cut_t      = the k-th largest |entry| of task vector t, over all parameters
    majority   = sign of (coordinates elected positive - coordinates elected negative)

``cut_t`` is exact and found in two passes, with memory that does not grow with the model (see `selection`). A third
pass, when the cuts are known, finds the majority. Selecting exactly in a single pass would need memory for k entries of
every expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from .anchor import Context, TaskVectors, Whole, scaled, total
from .selection import order_statistics


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
    magnitudes = _Magnitudes(stream)
    return tuple(order_statistics(magnitudes, lambda n: (max(1, round(density * n)),))[:, 0].tolist())


@dataclass(frozen=True)
class _Magnitudes:
    """The rows `order_statistics` ranks: |tau_t| (n,) of every task and tensor."""

    stream: TaskVectors

    def __iter__(self) -> Iterator[Iterator[Tensor]]:
        for _, taus in self.stream:
            yield (tau.abs() for tau in taus)


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
    elected.add_(0.5 * state.majority).sign_()  # only a 0 is turned
    return join_agreeing(kept, elected, context.weights, reduce == "mean")


def join_agreeing(kept: Tensor, elected: Tensor, weights: Tensor, mean: bool) -> Tensor:
    """Sum (*shape) of the entries of ``kept`` (T, *shape) that have the sign ``elected`` (*shape); 0 where that is 0.

    ``mean`` divides by the sum of ``|a_t|``, the task weights that ``kept`` carries, over the entries that agree.
    """
    elected = elected.to(kept.dtype)
    along = (kept * elected).clamp_(min=0)  # (T, *shape), the sizes of the entries that agree
    together = total(along)  # (*shape); of one sign, so that no digit cancels
    if mean:
        count = total(scaled(along.sign_(), weights.abs()))  # (*shape)
        together /= count.clamp_(min=torch.finfo(count.dtype).tiny)  # where nothing agrees the total is 0
    return together.mul_(elected)
