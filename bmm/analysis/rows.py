"""From the rows of a study to its `Analysis`: one Gaussian process of the objective, and questions to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bmm.errors import StudyError
from bmm.records import Trial
from bmm.search.goal import Goal
from bmm.search.gp import Array
from bmm.search.prior import prior_of
from bmm.search.space import LOG10_LAM, RHO, Space
from bmm.search.study import best
from bmm.search.surrogate import Surrogate

from .records import (
    Ablation,
    Analysis,
    Certainty,
    Difference,
    Effect,
    Expectation,
    Importance,
    Prediction,
    Progress,
)
from .sobol import sobol_indices

MIN_TRIALS = 8
"""Below so many completed trials a model of the objective says next to nothing."""

_GRID = 25
_FOLDS = 10
_TWO_SIDED_95 = 1.96


def analyse_rows(
    trials: Sequence[Trial], space: Space, reference: Mapping[str, float], goal: Goal | None = None
) -> Analysis:
    """What the completed ones of ``trials`` tell; failed and pending ones are only counted.

    The anchor (lam = inf) stands on the upper bound of log10 lam, as it does for the engines. ``reference`` gives each
    task's score of its own expert, ``goal`` what makes a trial the best where it is not the objective alone.

    Raises `StudyError` below `MIN_TRIALS` completed trials.
    """
    done = [t for t in trials if t.status == "completed"]
    if len(done) < MIN_TRIALS:
        raise StudyError(
            f"an analysis needs {MIN_TRIALS} completed trials, the study has {len(done)}",
            "continue it with `bmm tune --resume FOLDER --budget N`",
        )
    x = np.array([space.to_unit(space.point_of(t.hyperparameters)) for t in done])  # (n, d)
    y = np.array([t.objective for t in done], dtype=np.float64)  # (n,)
    surrogate = Surrogate(x, y, prior=prior_of(space))
    winner = done.index(best(done, goal))
    importance = _importance(surrogate, space)
    rank = {found.parameter: place for place, found in enumerate(importance)}
    return Analysis(
        completed=len(done),
        failed=sum(t.status == "failed" for t in trials),
        pending=sum(t.status == "pending" for t in trials),
        noise_sd=surrogate.noise,
        importance=importance,
        ablations=_ablations(surrogate, space, x[winner]),
        effects=sorted(_effects(surrogate, space, x[winner]), key=lambda e: rank[e.parameter]),
        prediction=_prediction(surrogate, done),
        progress=_progress(done, reference, goal),
        certainty=_certainty(surrogate, done, winner),
    )


def _importance(surrogate: Surrogate, space: Space) -> list[Importance]:
    first, total = sobol_indices(surrogate)
    found = [
        Importance(p.name, float(scale), float(one), float(all_))
        for p, scale, one, all_ in zip(space.parameters, surrogate.hyper.lengthscales, first, total, strict=True)
    ]
    return sorted(found, key=lambda i: -i.total)


def ablation_groups(space: Space) -> dict[str, list[int]]:
    """Indices of the parameters that go back together: a module group's lam and rho, all task weights, ..."""
    groups: dict[str, list[int]] = {}
    for index, parameter in enumerate(space.parameters):
        kind, _, owner = parameter.name.partition("/")
        groups.setdefault(owner if kind in (LOG10_LAM, RHO) else kind, []).append(index)
    return groups


def _ablations(surrogate: Surrogate, space: Space, winner: Array) -> list[Ablation]:
    default = space.to_unit({p.name: p.default for p in space.parameters})  # (d,)
    found = []
    for group, members in ablation_groups(space).items():
        ablated = winner.copy()
        ablated[members] = default[members]
        names = [space.parameters[m].name for m in members]
        found.append(Ablation(group, names, _difference(surrogate, ablated, winner)))
    return sorted(found, key=lambda a: a.change.mean)


def _effects(surrogate: Surrogate, space: Space, winner: Array) -> list[Effect]:
    unit = np.linspace(0, 1, _GRID)
    found = []
    for k, p in enumerate(space.parameters):
        mean, sd = surrogate.partial(k, unit)
        values = p.low + unit * (p.high - p.low)
        here = float(p.low + winner[k] * (p.high - p.low))
        found.append(Effect(p.name, values.tolist(), mean.tolist(), sd.tolist(), p.default, here))
    return found


def _prediction(surrogate: Surrogate, done: Sequence[Trial]) -> Prediction:
    observed = surrogate.y
    mean, variance = surrogate.leave_one_out()
    sd = np.sqrt(variance)
    residuals = (observed - mean) / sd
    return Prediction(
        trials=[t.number for t in done],
        observed=observed.tolist(),
        mean=mean.tolist(),
        sd=sd.tolist(),
        residuals=residuals.tolist(),
        r2=_r2(observed, mean),
        r2_refitted=_r2(observed, surrogate.cross_validated(_FOLDS)),
        coverage=float((np.abs(residuals) <= _TWO_SIDED_95).mean()),
    )


def _r2(observed: Array, predicted: Array) -> float | None:
    spread = float(((observed - observed.mean()) ** 2).sum())
    return 1 - float(((observed - predicted) ** 2).sum()) / spread if spread > 0 else None


def _progress(done: Sequence[Trial], reference: Mapping[str, float], goal: Goal | None) -> Progress:
    leaders = [best(done[: count + 1], goal) for count in range(len(done))]
    first = {t.kind: t.objective for t in done if t.kind != "search"}
    return Progress(
        trials=[t.number for t in done],
        objectives=[_value(t) for t in done],
        best=[_value(t) for t in leaders],
        tasks={task: [t.scores[task] / expert for t in leaders] for task, expert in reference.items()},
        anchor=first.get("anchor"),
        default=first.get("default"),
    )


def _certainty(surrogate: Surrogate, done: Sequence[Trial], winner: int) -> Certainty:
    means = surrogate.mean(surrogate.x)  # (n,)
    expected = winner if means[winner] >= means.max() else int(means.argmax())
    start = {t.kind: surrogate.x[row] for row, t in enumerate(done) if t.kind != "search"}
    top = surrogate.x[winner]
    return Certainty(
        best=_expectation(surrogate, done, winner),
        expected_best=_expectation(surrogate, done, expected),
        lead=_difference(surrogate, surrogate.x[expected], top),
        over_anchor=_difference(surrogate, top, start["anchor"]) if "anchor" in start else None,
        over_default=_difference(surrogate, top, start["default"]) if "default" in start else None,
    )


def _expectation(surrogate: Surrogate, done: Sequence[Trial], row: int) -> Expectation:
    mean, sd = surrogate.combination(surrogate.x[row : row + 1], np.ones(1))
    return Expectation(done[row].number, _value(done[row]), mean, sd)


def _difference(surrogate: Surrogate, a: Array, b: Array) -> Difference:
    """f(a) - f(b)."""
    return Difference(*surrogate.combination(np.stack([a, b]), np.array([1.0, -1.0])))


def _value(trial: Trial) -> float:
    assert trial.objective is not None, "a completed trial has an objective"
    return trial.objective
