"""What a study maximises: one number from the scores of the tasks, what must hold, and what is traded against what.

Everything is in shares of the experts' own scores, ``r_t = score_t / reference_t``. A *goal* is

- a kind of mean over tasks, ``mean`` (weighted), ``geometric`` (weighted) or ``worst`` (the lowest ``r_t``),
- ``floors``: shares below which a task must not fall,
- ``objectives``: named groups of tasks, each with its own mean, that are traded against one another. Without any there
  is one objective, over all tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bmm.errors import RecipeError, did_you_mean
from bmm.records import Trial

KINDS = ("mean", "worst", "geometric")
EVERY = "*"
"""In floors: every task that is not named itself."""

HIGHEST_FLOOR = 1.5
PENALTY = 2.0
"""What a share missed by a floor costs an engine that knows no constraints, in shares of the objective.

The most that a mean of shares can gain while one task loses is, unless tasks improve at very different rates, about
what that task loses: twice that makes breaking a floor a bad bargain without drowning the objective in penalties.
"""

_SLACK = 1e-12  # a floor of 0.95 of 0.8 is held by 0.76, whatever the last bit says


@dataclass(frozen=True)
class Goal:
    """A goal with its numbers filled in; build one with `Goal.of`, which checks them.

    ``reference`` gives each task's score of its own expert, ``shares`` each task's weight (they sum to one), ``floors``
    the lowest share allowed of the tasks that have one, ``objectives`` the tasks of each named objective.
    """

    reference: Mapping[str, float]
    shares: Mapping[str, float]
    kind: str = "mean"
    floors: Mapping[str, float] = field(default_factory=dict)
    objectives: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        reference: Mapping[str, float],
        weights: Mapping[str, float] | None = None,
        kind: str = "mean",
        floor: Mapping[str, float] | None = None,
        objectives: Sequence[str] = (),
    ) -> Goal:
        """The goal of these tasks; ``floor`` and ``objectives`` as in the recipe. Raises `RecipeError`."""
        shares = shares_of(reference, weights)
        if kind not in KINDS:
            raise RecipeError(f"no goal {kind!r}", did_you_mean(kind, KINDS))
        check_floors(floor or {})
        check_names(floor or {}, objectives, shares)
        given = dict(floor or {})
        floors = {t: given[t] if t in given else given[EVERY] for t in reference if t in given or EVERY in given}
        exact = {t: float(v) for t, v in reference.items()}
        return cls(exact, shares, kind, {t: float(v) for t, v in floors.items()}, parse_objectives(objectives))

    @property
    def plain(self) -> bool:
        """Whether the goal is the weighted mean and nothing else: linear in the scores."""
        return self.kind == "mean" and not self.floors and not self.objectives

    def coefficients(self) -> dict[str, float]:
        """What a point of each task's score counts in the weighted mean."""
        return {task: self.shares[task] / value for task, value in self.reference.items()}

    def groups(self) -> dict[str, dict[str, float]]:
        """By objective ("" where there is one only), the tasks that count in it and their weights, which sum to one."""
        if not self.objectives:
            return {"": {t: share for t, share in sorted(self.shares.items()) if share > 0}}
        found = {}
        for name, tasks in self.objectives.items():
            total = math.fsum(self.shares[t] for t in tasks)
            found[name] = {t: self.shares[t] / total for t in sorted(tasks) if self.shares[t] > 0}
        return found

    def values(self, scores: Mapping[str, float]) -> dict[str, float]:
        """The objectives by name; the one of a goal without named ones is "".

        Raises `ValueError` for the geometric mean of a negative score.
        """
        return {name: self._averaged(scores, shares) for name, shares in self.groups().items()}

    def value(self, scores: Mapping[str, float]) -> float:
        """The number a study ranks its trials by: the objective, or the mean of the objectives."""
        values = self.values(scores)
        return math.fsum(values.values()) / len(values)

    def _averaged(self, scores: Mapping[str, float], shares: Mapping[str, float]) -> float:
        ratios = {task: scores[task] / self.reference[task] for task in shares}
        if self.kind == "worst":
            return min(ratios.values())
        if self.kind == "mean":
            return math.fsum(shares[t] * ratio for t, ratio in ratios.items())
        if negative := [t for t, ratio in ratios.items() if ratio < 0]:
            raise ValueError(f"the geometric mean takes no score below 0: {negative[0]} {scores[negative[0]]}")
        if not all(ratios.values()):
            return 0.0
        return math.exp(math.fsum(shares[t] * math.log(ratio) for t, ratio in ratios.items()))

    def shortfalls(self, scores: Mapping[str, float]) -> dict[str, float]:
        """By how much of its expert's score each task falls below its floor; only the tasks that do."""
        short = {t: floor - scores[t] / self.reference[t] for t, floor in self.floors.items()}
        return {t: miss for t, miss in short.items() if miss > _SLACK}

    def violation(self, scores: Mapping[str, float]) -> float:
        """The sum of the shortfalls: 0 where every floor holds."""
        return math.fsum(self.shortfalls(scores).values())

    def rank(self, trial: Trial) -> tuple[float, float, int]:
        """Grows with how good a completed trial is: floors first, then the objective, the earlier of equals."""
        assert trial.objective is not None
        return -self.violation(trial.scores), trial.objective, -trial.number

    def penalised(self, trial: Trial) -> Trial:
        """The trial as an engine sees it that knows no constraints."""
        if trial.objective is None or not (missed := self.violation(trial.scores)):
            return trial
        return replace(trial, objective=trial.objective - PENALTY * missed)

    def judged(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """What a `StudyResult` says of its trials: goal, objectives and violations (the latter where there are any)."""
        done = [t for t in trials if t.status == "completed"]
        return {
            "goal": self.to_json(),
            "objectives": {t.number: self.values(t.scores) for t in done} if self.objectives else {},
            "violations": {t.number: self.violation(t.scores) for t in done} if self.floors else {},
        }

    def to_json(self) -> dict[str, Any]:
        """All of it, as a study records it."""
        return {
            "reference": dict(self.reference),
            "weights": dict(self.shares),
            "goal": self.kind,
            "floor": dict(self.floors),
            "objectives": [[name, list(tasks)] for name, tasks in self.objectives.items()],
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Goal:
        raw = {**PLAIN, **raw}
        return cls(
            raw["reference"], raw["weights"], raw["goal"], raw["floor"], {n: tuple(t) for n, t in raw["objectives"]}
        )


PLAIN: dict[str, Any] = {"goal": "mean", "floor": {}, "objectives": []}
"""What a study that records none of these was begun with."""


def shares_of(reference: Mapping[str, float], weights: Mapping[str, float] | None) -> dict[str, float]:
    """The tasks' weights, scaled to sum to one. Raises `RecipeError`."""
    if not reference:
        raise RecipeError("a study needs at least one task")
    for task, value in reference.items():
        if not math.isfinite(value) or value <= 0:
            raise RecipeError(
                f"task {task!r}: its expert's validation score is {value}, so scores cannot be normalised by it",
                "check the expert, its head and the validation data of that task",
            )
    if weights is None:
        return {task: 1 / len(reference) for task in reference}
    if wrong := sorted(weights.keys() ^ reference.keys()):
        raise RecipeError(f"weights and tasks do not agree on {', '.join(wrong)}", "give one weight a task")
    if any(not math.isfinite(w) or w < 0 for w in weights.values()) or not sum(weights.values()) > 0:
        raise RecipeError("task weights must be finite, not negative, and not all zero")
    total = math.fsum(weights.values())
    return {task: float(weights[task]) / total for task in reference}


def parse_objectives(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """``TASK`` or ``NAME=TASK+TASK`` each, as tasks by name. Raises `RecipeError` for what makes no trade-off."""
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, equals, listed = (part.strip() for part in text.partition("="))
        tasks = tuple(part.strip() for part in (listed if equals else name).split("+"))
        if not equals and len(tasks) > 1:
            raise RecipeError(f"objective {text!r} has no name", f"write NAME={text}")
        if not name or not all(tasks):
            raise RecipeError(f"objective {text!r} names no task", "write TASK, or NAME=TASK+TASK")
        if name in found:
            raise RecipeError(f"two objectives are called {name}", "give each a name of its own: NAME=TASK+TASK")
        if repeated := sorted({t for t in tasks if tasks.count(t) > 1}):
            raise RecipeError(f"objective {name!r} names {', '.join(repeated)} twice", "weights count a task more")
        found[name] = tasks
    if len(found) == 1:
        raise RecipeError(
            f"one objective ({next(iter(found))}) leaves nothing to trade", "name two or more, or set weights instead"
        )
    return found


def check_floors(floor: Mapping[str, float]) -> None:
    """Raises `RecipeError` for a floor outside (0, `HIGHEST_FLOOR`]."""
    for task, value in floor.items():
        if not 0 < value <= HIGHEST_FLOOR:
            raise RecipeError(
                f"floor {value:g} of {'every task' if task == EVERY else task} is not in (0, {HIGHEST_FLOOR:g}]",
                "it is a share of the expert's own score, for example 0.95",
            )


def check_stopping(risk: float, kind: str, floor: Mapping[str, float], objectives: Sequence[str]) -> None:
    """Raises `RecipeError` for early stopping under another goal than the mean: its forecasts are of weighted means."""
    if risk and (kind != "mean" or floor or objectives):
        what = f"goal {kind}" if kind != "mean" else "a floor" if floor else "objectives"
        raise RecipeError(f"early_stopping does not go with {what}", "its forecasts are of the weighted mean: drop one")


def check_names(floor: Mapping[str, float], objectives: Sequence[str], tasks: Mapping[str, float]) -> None:
    """Raises `RecipeError` for a floor or an objective that does not fit ``tasks``, their weights by name."""
    for task in floor:
        if task != EVERY and task not in tasks:
            raise RecipeError(f"floor of an unknown task {task!r}", did_you_mean(task, tasks))
    for name, members in parse_objectives(objectives).items():
        for task in members:
            if task not in tasks:
                raise RecipeError(f"objective {name!r}: unknown task {task!r}", did_you_mean(task, tasks))
        if not any(tasks[task] > 0 for task in members):
            raise RecipeError(f"objective {name!r}: all of its tasks have weight 0", "give one of them a weight")
