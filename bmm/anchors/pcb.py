"""PCB: balance the competition of parameters within a task and between tasks, drop the losers, rescale the rest.

Everything here is defined on the flattened task vector of the whole model: its norms, softmaxes and cuts are found by
`scan_pcb` in four passes and bounded memory before any tensor is merged. The paper and its released code differ:

"paper" (arXiv 2410.02396, equations 2 to 5), with N tasks and D parameters:

    beta_i = softmax_D(N norm(tau_i tau_i)) * sum_j softmax_D(norm(tau_i tau_j))
    m_i    = beta_i >= the (ratio D)-th largest beta_i
    d      = sum_i m_i beta_i tau_i / sum_i m_i beta_i

where the paper leaves norm open; it is min-max here, as in the code. A softmax over D = 1e8 numbers of [0, 1] makes
beta_i nearly flat, from 1 to e^(N + 1) between the extremes.

"code", what the released program does, and what other implementations follow:

    tau_i  : magnitudes clamped to the range between their 1e-4 tails
    beta_i = exp(N norm(|tau_i|)^2) * tanh(tau_i sum_j tau_j), with the unclamped tau_j
    b_i    = min-max over [cut, max] of beta_i, cut the (ratio D)-th largest; 0 below
    d      = sum_i b_i tau_i / sum_i b_i

Either form is discontinuous at the cut: an entry alone in its coordinate keeps its full size just above it, however
small its weight, and vanishes below.
Entries of 0 take no part: a task that did not move a parameter does not thin out those that did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .anchor import Context, TaskVectors, Whole, scaled
from .selection import order_statistics

TAIL = 1e-4
"""Share of each end of a task vector's magnitudes that the released code clamps."""

Balance = Literal["code", "paper"]


class Scorer(Protocol):
    """Scores beta_i of task i's entries, and their final weights given the cut and the largest score."""

    def scores(self, taus: Tensor, i: int) -> Tensor:
        """(T, *shape) -> (*shape), float64."""
        ...

    def values(self, taus: Tensor, i: int) -> Tensor:
        """What of task i is merged, (T, *shape) -> (*shape)."""
        ...

    def competition(self, scores: Tensor, cut: float, top: float) -> Tensor:
        """Weights of the entries in the merge, (*shape), from scores that float32 ranks."""
        ...


@dataclass(frozen=True)
class PcbState:
    """``scorer`` with the statistics of the model; ``cuts`` and ``tops``: lowest kept and highest score, one a task."""

    scorer: Scorer
    cuts: tuple[float, ...]
    tops: tuple[float, ...]


def scan_pcb(stream: TaskVectors, knobs: Mapping[str, Any], whole: Whole) -> PcbState:
    """The statistics of either form, then the cuts at ``knobs["ratio"]``: two passes each."""
    weighted = _Weighted(stream, whole.weights)
    scorer: Scorer = _code_scorer(weighted) if knobs["balance"] == "code" else _paper_scorer(weighted)
    scored = _Rows(weighted, scorer)
    bounds = order_statistics(scored, lambda n: (1, max(1, round(knobs["ratio"] * n))))  # (T, 2)
    return PcbState(scorer, tuple(bounds[:, 1].tolist()), tuple(bounds[:, 0].tolist()))


def pcb(taus: Tensor, context: Context, *, balance: Balance, ratio: float) -> Tensor:
    """Balance, drop and rescale (arXiv 2410.02396): ``taus`` (T, *shape) -> (*shape); see the head of this file.

    ``balance`` chooses the form and ``ratio`` the share of each task's entries that stay; both act through the scan.
    Task weights multiply the task vectors first. One expert at ratio 1 and balance "paper" gives that expert.
    """
    state: PcbState = context.state
    kept = scaled(taus, context.weights)  # (T, *shape)
    total = torch.zeros_like(kept[0], dtype=torch.float64)  # (*shape)
    mass = torch.zeros_like(total)
    for i in range(len(kept)):
        weight = state.scorer.competition(state.scorer.scores(kept, i), state.cuts[i], state.tops[i])
        weight = weight * (kept[i] != 0)  # (*shape)
        total += weight * state.scorer.values(kept, i)
        mass += weight
    return (total / mass.where(mass > 0, torch.ones_like(mass))).to(taus.dtype)


# -- the released code ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CodeScorer:
    """``low`` and ``high``: the magnitudes the entries are clamped to, one pair a task."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    def scores(self, taus: Tensor, i: int) -> Tensor:
        sizes = _min_max(taus[i].double().abs().clamp(self.low[i], self.high[i]), self.low[i], self.high[i])
        # one factor e^-N for all tasks, which cancels in the end, keeps float32 from overflowing
        intra = torch.exp(len(taus) * (sizes.square() - 1))
        return intra * torch.tanh(taus[i].double() * taus.sum(0, dtype=torch.float64))

    def values(self, taus: Tensor, i: int) -> Tensor:
        return taus[i].sign() * taus[i].double().abs().clamp(self.low[i], self.high[i])

    def competition(self, scores: Tensor, cut: float, top: float) -> Tensor:
        ranked = scores.float().double()  # in the cut's precision: what is at the cut must weigh 0, not 1e-9
        if top <= cut:  # one entry is kept, or all score alike
            return ((ranked >= cut) & (ranked > 0)).double()
        return ((ranked - cut) / (top - cut)).clamp(min=0)


def _code_scorer(stream: _Weighted) -> _CodeScorer:
    sizes = _Rows(stream, None)
    bounds = order_statistics(sizes, lambda n: (n - int(TAIL * n), 1 + int(TAIL * n)))  # (T, 2)
    return _CodeScorer(tuple(bounds[:, 0].tolist()), tuple(bounds[:, 1].tolist()))


# -- the paper's equations ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PaperScorer:
    """``low`` and ``high`` (T, T): range of ``tau_i tau_j``; ``inter`` (T, T) and ``intra`` (T,): means over all
    parameters of the exponentials, the softmaxes' denominators up to D."""

    low: Tensor
    high: Tensor
    inter: Tensor
    intra: Tensor

    def scores(self, taus: Tensor, i: int) -> Tensor:
        between = sum(
            torch.exp(_product(taus, i, j, self)) / float(self.inter[i, j]) for j in range(len(taus))
        )  # (*shape)
        within = torch.exp(len(taus) * (_product(taus, i, i, self) - 1)) / float(self.intra[i])
        return within * between

    def values(self, taus: Tensor, i: int) -> Tensor:
        return taus[i].double()

    def competition(self, scores: Tensor, cut: float, top: float) -> Tensor:
        return scores * (scores.float() >= cut)


def _paper_scorer(stream: _Weighted) -> _PaperScorer:
    low = high = torch.zeros(0)
    for _, taus in stream:
        products = [_extremes(taus, i) for i in range(len(taus))]
        lowest, highest = (torch.stack([p[end] for p in products]) for end in (0, 1))  # (T, T)
        low, high = (lowest, highest) if not len(low) else (low.minimum(lowest), high.maximum(highest))
    tasks = len(low)
    inter, intra = torch.zeros(tasks, tasks, dtype=torch.float64), torch.zeros(tasks, dtype=torch.float64)
    blank, count = _PaperScorer(low, high, inter, intra), 0
    for _, taus in stream:
        count += taus[0].numel()
        for i in range(tasks):
            for j in range(tasks):
                inter[i, j] += float(torch.exp(_product(taus, i, j, blank)).sum())
            intra[i] += float(torch.exp(tasks * (_product(taus, i, i, blank) - 1)).sum())
    return _PaperScorer(low, high, inter / max(count, 1), intra / max(count, 1))


def _extremes(taus: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry of ``tau_i tau_j`` for every j, two times (T,)."""
    flat = taus.reshape(len(taus), -1)
    ends = [torch.aminmax(flat[i].double() * flat[j].double()) for j in range(len(flat))]
    return torch.stack([e.min for e in ends]).cpu(), torch.stack([e.max for e in ends]).cpu()


def _product(taus: Tensor, i: int, j: int, scorer: _PaperScorer) -> Tensor:
    """``norm(tau_i tau_j)``, (*shape), 0 to 1."""
    return _min_max(taus[i].double() * taus[j].double(), float(scorer.low[i, j]), float(scorer.high[i, j]))


def _min_max(values: Tensor, low: float, high: float) -> Tensor:
    """``(values - low) / (high - low)``, 0 where there is no range."""
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


# -- streams ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weighted:
    """A stream of task vectors times their task weights; as often iterable as the stream itself."""

    stream: TaskVectors
    weights: Tensor

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, taus in self.stream:
            yield name, scaled(taus, self.weights)


@dataclass(frozen=True)
class _Rows:
    """Scores of every task's entries, or their magnitudes where there is no scorer yet."""

    stream: _Weighted
    scorer: Scorer | None

    def __iter__(self) -> Iterator[Iterator[Tensor]]:
        for _, taus in self.stream:
            yield (taus[i].abs() if self.scorer is None else self.scorer.scores(taus, i) for i in range(len(taus)))
