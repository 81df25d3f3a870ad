"""Early stopping: when the tasks scored so far make a trial a loser, the others need not be scored.

Tasks of a trial are scored in an order drawn from the seed. Scores of one merged model on its tasks are correlated
(what helps one often helps all), so the completed trials of the study say what the missing ones will be: scores are
taken as jointly Gaussian over trials, with mean and covariance from the completed ones, shrunk towards equal
correlations while they are few. All trials are scored on the same inputs, so the comparison with the best trial so far
is a paired one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bmm.records import Trial

Array = NDArray[np.float64]

MIN_TRIALS = 6
"""So many completed trials come before the first that may be stopped."""
_PRIOR_TRIALS = 8.0  # weight of the shrinkage target, in trials


@dataclass(frozen=True)
class Forecast:
    """Of a trial's objective after some of its tasks: mean, standard deviation, and the scores expected, by task."""

    mean: float
    deviation: float
    scores: dict[str, float]

    def chance_above(self, value: float) -> float:
        """The probability that the objective ends above ``value``."""
        if self.deviation == 0:
            return float(self.mean > value)
        return 0.5 * math.erfc((value - self.mean) / (self.deviation * math.sqrt(2)))


class Forecaster:
    """What completed trials say of the tasks a trial has not been scored on.

    Args:
        completed: Scores of the completed trials, by task; at least two.
        coefficients: What each task's score counts in the objective.
    """

    def __init__(self, completed: Sequence[Mapping[str, float]], coefficients: Mapping[str, float]) -> None:
        if len(completed) < 2:
            raise ValueError(f"{len(completed)} completed trials: a forecast needs two")
        self.tasks = sorted(coefficients)
        self.coefficients = np.array([coefficients[t] for t in self.tasks])  # (T,)
        scores = np.array([[row[t] for t in self.tasks] for row in completed])  # (n, T)
        self.mean = scores.mean(0)  # (T,)
        self.trials = len(scores)
        self.covariance = (1 + 1 / len(scores)) * _shrunk(np.cov(scores, rowvar=False, ddof=1), len(scores))

    def __call__(self, scores: Mapping[str, float]) -> Forecast:
        """The forecast after some tasks' ``scores``."""
        known = np.array([t in scores for t in self.tasks])
        values = self.mean.copy()
        values[known] = [scores[t] for t in self.tasks if t in scores]
        if known.all():
            return Forecast(float(self.coefficients @ values), 0.0, dict(zip(self.tasks, values.tolist(), strict=True)))
        spread = self.covariance[np.ix_(~known, ~known)]
        if known.any():
            inner = self.covariance[np.ix_(known, known)]
            cross = self.covariance[np.ix_(~known, known)]
            gain = np.linalg.lstsq(inner, cross.T, rcond=1e-10)[0].T  # (missing, known); constant tasks tell nothing
            values[~known] += gain @ (values[known] - self.mean[known])
            # the gain was estimated too: the more so, the more tasks it uses of few trials
            spread = (spread - gain @ cross.T) * self.trials / max(self.trials - known.sum() - 1, self.trials / 2)
        missing = self.coefficients[~known]
        variance = max(float(missing @ spread @ missing), 0.0)
        expected = dict(zip(self.tasks, values.tolist(), strict=True))
        return Forecast(float(self.coefficients @ values), math.sqrt(variance), expected)


class Stopper:
    """Reads a trial's scores task by task and stops where the trial is a loser.

    Args:
        coefficients: What each task's score counts in the objective.
        seed: The study's.
        risk: A trial is stopped when the probability that it becomes the best falls below this.
    """

    def __init__(self, coefficients: Mapping[str, float], seed: int, risk: float) -> None:
        self.coefficients, self.seed, self.risk = dict(coefficients), seed, risk

    def scores(
        self, trial: Trial, trials: Sequence[Trial], found: Mapping[str, float]
    ) -> tuple[dict[str, float], Forecast | None]:
        """The scores read from ``found``, and, where the trial was stopped, what its objective would have been.

        Anchor and default are scored in full, and so is everything before `MIN_TRIALS` completed trials; only trials
        of a lower number are looked at, so that a trial evaluated again ends as it did.
        """
        before = [t for t in trials if t.number < trial.number and t.status == "completed"]
        if trial.kind != "search" or len(before) < MIN_TRIALS:
            return {task: float(found[task]) for task in found}, None
        forecaster = Forecaster([t.scores for t in before], self.coefficients)
        leader = max(t.objective for t in before if t.objective is not None)
        scores: dict[str, float] = {}
        order = order_of_tasks(list(self.coefficients), self.seed, trial.number)
        for task in order:
            value = float(found[task])
            if not math.isfinite(value):
                raise ValueError(f"score not finite: {task} {value}")
            scores[task] = value
            forecast = forecaster(scores)
            if len(scores) < len(order) and forecast.chance_above(leader) < self.risk:
                return scores, forecast
        return scores, None


def order_of_tasks(tasks: Sequence[str], seed: int, number: int) -> list[str]:
    """The order in which trial ``number`` scores its tasks."""
    generator = np.random.default_rng(np.random.SeedSequence([seed, number]))
    return [sorted(tasks)[i] for i in generator.permutation(len(tasks))]


def _shrunk(covariance: Array, trials: int) -> Array:
    """The covariance, (T, T), mixed with one that has its variances and their mean correlation everywhere."""
    covariance = np.atleast_2d(covariance)
    deviations = np.sqrt(np.diag(covariance))
    scale = np.outer(deviations, deviations)
    count = len(deviations)
    correlations = np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)
    off = correlations.sum() - np.trace(correlations)
    shared = min(max(off / max(count * (count - 1), 1), 0.0), 1.0)
    target = scale * shared
    np.fill_diagonal(target, deviations**2)
    share = _PRIOR_TRIALS / (_PRIOR_TRIALS + trials)
    mixed: Array = (1 - share) * covariance + share * target
    return mixed
