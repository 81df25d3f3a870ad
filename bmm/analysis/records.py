"""The findings of an analysis as plain data; all of it round-trips through JSON.

Objectives are in the units of the study's objective. Parameters go by their names in the search space and have its
units: log10 for ``log10_lam/GROUP`` and ``log10_weight/TASK``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Importance:
    """How much of the model's variation over the whole search box one parameter makes.

    ``first`` and ``total`` are Sobol indices of the posterior mean, shares of its variance: by the parameter alone, and
    with all its interactions. ``lengthscale`` is the Gaussian process's, in units of the parameter's range: the
    shorter, the faster the objective changes along it.
    """

    parameter: str
    lengthscale: float
    first: float
    total: float


@dataclass(frozen=True)
class Difference:
    """Expected difference of two points' objectives and its posterior standard deviation."""

    mean: float
    sd: float


@dataclass(frozen=True)
class Ablation:
    """Expected change of the best trial's objective when ``parameters`` alone go back to their defaults.

    Negative: tuning them helped. ``group`` is a module group, or what else was searched ("gamma", "log10_weight").
    """

    group: str
    parameters: list[str]
    change: Difference


@dataclass(frozen=True)
class Effect:
    """Expected objective along one parameter, averaged over the other parameters of the points tried.

    ``mean`` and ``sd`` (posterior, of the average) belong to the values of ``grid``; ``default`` and ``best`` are the
    parameter's values there.
    """

    parameter: str
    grid: list[float]
    mean: list[float]
    sd: list[float]
    default: float
    best: float


@dataclass(frozen=True)
class Prediction:
    """Each completed trial predicted from all others, with the hyperparameters fitted to all.

    ``sd`` includes the noise; ``residuals`` are (observed - mean) / sd; ``coverage`` is the share of trials inside
    ``mean +- 1.96 sd``. ``r2`` is one minus the squared errors' share of the variance, flattered by hyperparameters
    that have seen the trials they predict: pure noise reaches 0.3 and more. ``r2_refitted``, from folds predicted by
    models fitted without them, is the one to believe; noise leaves it below or near zero. Both are None where all
    objectives are equal.
    """

    trials: list[int]
    observed: list[float]
    mean: list[float]
    sd: list[float]
    residuals: list[float]
    r2: float | None
    r2_refitted: float | None
    coverage: float


@dataclass(frozen=True)
class Progress:
    """The study in the order of its completed ``trials``.

    ``best`` is the highest objective so far and ``tasks`` the scores of the trial that has it, as shares of the
    experts' own; ``anchor`` and ``default`` are objectives, None where that trial is not completed.
    """

    trials: list[int]
    objectives: list[float]
    best: list[float]
    tasks: dict[str, list[float]]
    anchor: float | None
    default: float | None


@dataclass(frozen=True)
class Expectation:
    """A tried point: what was observed, and what the model expects of it, without noise."""

    trial: int
    observed: float
    mean: float
    sd: float


@dataclass(frozen=True)
class Certainty:
    """How sure the best is.

    ``best`` has the highest observed objective, ``expected_best`` the highest posterior mean of all tried points.
    ``lead`` is the second less the first, ``over_anchor`` and ``over_default`` are ``best`` less those trials (None
    where that trial is not completed).
    """

    best: Expectation
    expected_best: Expectation
    lead: Difference
    over_anchor: Difference | None
    over_default: Difference | None


@dataclass(frozen=True)
class Analysis:
    """What the completed rows of a study tell.

    ``importance`` and ``effects`` have the largest total index first, ``ablations`` the largest loss first.
    ``noise_sd`` is the standard deviation of the objective's noise as fitted.
    """

    completed: int
    failed: int
    pending: int
    noise_sd: float
    importance: list[Importance]
    ablations: list[Ablation]
    effects: list[Effect]
    prediction: Prediction
    progress: Progress
    certainty: Certainty

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Analysis:
        certainty = raw["certainty"]
        differences = {k: _difference(certainty[k]) for k in ("lead", "over_anchor", "over_default")}
        points = {k: Expectation(**certainty[k]) for k in ("best", "expected_best")}
        return cls(
            **{k: raw[k] for k in ("completed", "failed", "pending", "noise_sd")},
            importance=[Importance(**i) for i in raw["importance"]],
            ablations=[Ablation(**(a | {"change": Difference(**a["change"])})) for a in raw["ablations"]],
            effects=[Effect(**e) for e in raw["effects"]],
            prediction=Prediction(**raw["prediction"]),
            progress=Progress(**raw["progress"]),
            certainty=Certainty(**(certainty | points | differences)),
        )


def _difference(raw: dict[str, float] | None) -> Difference | None:
    return None if raw is None else Difference(**raw)
