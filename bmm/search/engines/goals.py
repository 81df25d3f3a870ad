"""Acquisitions for goals that are no weighted mean: worst task, geometric mean, floors, several objectives.

Tasks are modelled by `Processes`, goals are computed on samples of them. One objective is improved upon by qLogNEI, the
front of two to four by qLogNEHVI (arXiv 2105.08195, in the logarithmic form of 2310.20708), more by qLogNEI on one
random scalarisation a trial (qNParEGO of 2105.08195), because the cost of hypervolumes grows steeply with their
dimension. Floors are outcome constraints of all of them; as long as no trial keeps every floor, the probability of
doing so is maximised instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bmm.dominance import non_dominated
from bmm.records import Trial
from bmm.search.engines.processes import Array, processes_class
from bmm.search.goal import Goal
from bmm.search.gp import Prior

if TYPE_CHECKING:
    from torch import Tensor

HYPERVOLUME_OBJECTIVES = 4
"""With more objectives than this, each trial improves a random scalarisation."""

_MARGIN = 0.1  # of an objective's spread: how far the reference point lies below what is worth having
_TILT = 0.05  # of the plain sum in a scalarisation, so that no weakly dominated point is as good as a front's


@dataclass(frozen=True)
class Outcomes:
    """What is modelled and what becomes of it.

    Attributes:
        values: One row a modelled outcome, in shares of the experts' scores: (m, n).
        parts: For each objective, the rows it is a mean of with their weights.
        kind: Of that mean.
        floors: The lowest value allowed, by row.
    """

    values: Array
    parts: list[dict[int, float]]
    kind: str
    floors: dict[int, float]


def outcomes_of(goal: Goal, rows: Sequence[Trial]) -> Outcomes:
    """Every objective by itself, or, of the worst task, every task; floors by task."""
    by_task = goal.kind == "worst"  # the lowest of several tasks has kinks that no smooth process follows
    groups, columns = goal.groups(), dict[tuple[str, str], list[float]]()
    objectives = [goal.values(row.scores) for row in rows]
    if not by_task:
        columns |= {("objective", name): [values[name] for values in objectives] for name in groups}
    for task in sorted({*goal.floors, *(t for shares in groups.values() for t in shares if by_task)}):
        columns["task", task] = [row.scores[task] / goal.reference[task] for row in rows]
    place = {key: index for index, key in enumerate(columns)}
    parts = [
        {place["task", t]: share for t, share in shares.items()} if by_task else {place["objective", name]: 1.0}
        for name, shares in groups.items()
    ]
    return Outcomes(
        np.array(list(columns.values()), dtype=np.float64),
        parts,
        goal.kind if by_task else "mean",
        {place["task", t]: floor for t, floor in sorted(goal.floors.items())},
    )


def reference_point(values: Array, anchor: Array | None) -> tuple[Array, Array]:
    """Where hypervolume begins, and each objective's unit: (k,), (k,).

    The reference point lies below the anchor and below every point of the front, by a tenth of what lies between the
    lowest and the highest of them: an end of the front still counts, a trial worse than the anchor in everything never.

    Args:
        values: Objectives of the completed trials that may win: (n, k).
        anchor: Those of the anchor, where it completed: (k,).
    """
    near = values[non_dominated(values.tolist())]
    if anchor is not None:
        near = np.vstack([near, anchor])
    low, spread = near.min(0), np.ptp(near, axis=0)
    wide = values.std(0)
    spread = np.where(spread > 1e-9, spread, np.where(wide > 1e-9, wide, 1.0))
    return low - _MARGIN * spread, spread


def _standard(values: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of one objective: (n, 1) to (1,), (1,)."""
    deviation = values.std(0)
    return values.mean(0), np.where(deviation > 1e-12, deviation, 1.0)


def acquisition(goal: Goal, x: Array, rows: Sequence[Trial], pending: Any, *, prior: Prior, seed: int) -> Any:
    """What the next trial maximises, as a BoTorch acquisition function.

    Args:
        goal: Any but the plain weighted mean.
        x: Unit points of the completed ``rows``: (n, d).
        pending: Unit points being evaluated, or failed: (p, d), or None.
        prior: Of lengthscales, the same for every outcome.
        seed: Of the scalarisation of many objectives.
    """
    import torch
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement, qLogProbabilityOfFeasibility
    from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
    from botorch.acquisition.multi_objective.objective import GenericMCMultiOutputObjective
    from botorch.acquisition.objective import GenericMCObjective

    outcomes = outcomes_of(goal, rows)
    model = processes_class()(x, outcomes.values, prior)
    constraints = _constraints(outcomes.floors, model.deviations)
    allowed = [i for i, row in enumerate(rows) if not goal.shortfalls(row.scores)]
    if not allowed:
        return qLogProbabilityOfFeasibility(model, constraints, X_pending=pending)
    values = np.array([list(goal.values(row.scores).values()) for row in rows])  # (n, k)
    anchor = next((values[i] for i, row in enumerate(rows) if row.kind == "anchor"), None)
    scale = reference_point(values[allowed], anchor) if values.shape[1] > 1 else _standard(values)
    low, unit = (torch.from_numpy(v) for v in scale)  # (k,)
    baseline, objectives = torch.from_numpy(x), _objectives(outcomes)

    def scaled(samples: Tensor, X: Tensor | None = None) -> Tensor:
        return (objectives(samples) - low) / unit  # (..., k)

    common = {"constraints": constraints or None, "X_pending": pending, "prune_baseline": True}
    if 1 < values.shape[1] <= HYPERVOLUME_OBJECTIVES:
        return qLogNoisyExpectedHypervolumeImprovement(
            model,
            torch.zeros_like(low),
            baseline,
            objective=GenericMCMultiOutputObjective(scaled),
            **common,
        )
    weights = np.random.default_rng(seed).dirichlet(np.ones(values.shape[1]))
    single = _scalarised(scaled, torch.from_numpy(weights)) if len(weights) > 1 else _first(scaled)
    return qLogNoisyExpectedImprovement(model, baseline, objective=GenericMCObjective(single), **common)


def _objectives(outcomes: Outcomes) -> Callable[[Tensor], Tensor]:
    """(..., m) samples of the outcomes to (..., k) objectives."""
    import torch

    chosen = [
        (list(part), torch.tensor(list(part.values()), dtype=torch.float64), outcomes.kind) for part in outcomes.parts
    ]

    def objectives(samples: Tensor) -> Tensor:
        return torch.stack([_averaged(samples[..., rows], shares, kind) for rows, shares, kind in chosen], dim=-1)

    return objectives


def _averaged(ratios: Tensor, shares: Tensor, kind: str) -> Tensor:
    if kind == "worst":
        return ratios.amin(-1)
    if kind == "geometric":  # a process may stray below zero, where no score can
        return (shares * ratios.clamp_min(1e-6).log()).sum(-1).exp()
    return (shares * ratios).sum(-1)


def _constraints(floors: Mapping[int, float], deviations: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """Below zero where a sample, (..., m), keeps the floor; in standard deviations of the outcome."""

    def constraint(row: int, floor: float) -> Callable[[Tensor], Tensor]:
        return lambda samples: (floor - samples[..., row]) / deviations[row]

    return [constraint(row, floor) for row, floor in floors.items()]


def _first(scaled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda samples, X=None: scaled(samples)[..., 0]


def _scalarised(scaled: Callable[..., Tensor], weights: Tensor) -> Callable[..., Tensor]:
    """The augmented Chebyshev scalarisation: the worst weighted objective, tilted by their sum."""

    def single(samples: Tensor, X: Tensor | None = None) -> Tensor:
        weighted = weights * scaled(samples)  # (..., k)
        return weighted.amin(-1) + _TILT * weighted.sum(-1)

    return single
