"""Plain records that travel between the parts of a run and into its files; all of them round-trip through JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from .dominance import non_dominated
from .errors import StudyError

TrialStatus = Literal["pending", "completed", "stopped", "failed"]
TrialKind = Literal["anchor", "default", "search"]
RENAMED = {"objective": "score_by"}
"""Recipe keys by the names they had before: refused where a person writes one, read where a study holds one."""


def with_new_names(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a study on disk, under the keys' names of today. Raises `TypeError` where it is no mapping."""
    if not isinstance(recipe, Mapping):
        raise TypeError(f"a recipe is a mapping, not {type(recipe).__name__}")
    return {RENAMED.get(key, key): value for key, value in recipe.items()}


@dataclass(frozen=True)
class Score:
    """A score of one model on one task: ``value`` over ``n`` inputs (an accuracy, unless the task says otherwise)."""

    task: str
    value: float
    n: int

    @property
    def standard_error(self) -> float:
        """Binomial standard error ``sqrt(p (1 - p) / n)``, for other means of numbers in [0, 1] (agreement) an upper
        bound; NaN where the value is no proportion."""
        if self.n <= 0 or not 0 <= self.value <= 1:
            return math.nan
        return math.sqrt(self.value * (1 - self.value) / self.n)


@dataclass(frozen=True)
class Hyperparameters:
    """One point of the search: ``lam`` and ``rho`` for every module group.

    ``lam`` may be ``inf``, which means the anchor itself. JSON has no infinity: it is written as the string "inf".
    ``gamma`` (data-free share of hybrid Grams), ``weights`` (a_t by task name) and ``anchor_scale`` (factor on the
    anchor's task vector) are there where they were searched; None and missing ones stand for the recipe's.
    """

    lam: dict[str, float]
    rho: dict[str, float]
    gamma: float | None = None
    weights: dict[str, float] = field(default_factory=dict)
    anchor_scale: float | None = None

    @classmethod
    def uniform(cls, groups: list[str], lam: float, rho: float = 1.0) -> Hyperparameters:
        return cls(dict.fromkeys(groups, lam), dict.fromkeys(groups, rho))

    def to_json(self) -> dict[str, Any]:
        return {"lam": {g: _number_out(v) for g, v in self.lam.items()}, "rho": dict(self.rho)} | self.extras()

    def extras(self) -> dict[str, Any]:
        """What was searched besides lam and rho, by name; empty where nothing was."""
        found = {"gamma": self.gamma, "weights": dict(self.weights) or None, "anchor_scale": self.anchor_scale}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Hyperparameters:
        def number(name: str) -> float | None:
            return None if raw.get(name) is None else float(raw[name])

        return cls(
            {g: float(v) for g, v in raw["lam"].items()},
            {g: float(v) for g, v in raw["rho"].items()},
            number("gamma"),
            {t: float(v) for t, v in raw.get("weights", {}).items()},
            number("anchor_scale"),
        )


def _number_out(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


@dataclass(frozen=True)
class Trial:
    """One row of a study.

    ``scores`` are raw validation scores by task (higher is better), ``objective`` what the study's goal makes of them
    (None unless completed), ``suggest_seconds`` the engine's time, ``seconds`` the evaluation's. A stopped trial has
    the scores of some tasks only, and the objective that was forecast from them.
    """

    number: int
    kind: TrialKind
    status: TrialStatus
    hyperparameters: Hyperparameters
    scores: dict[str, float] = field(default_factory=dict)
    objective: float | None = None
    suggest_seconds: float = 0.0
    seconds: float = 0.0
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"hyperparameters": self.hyperparameters.to_json()}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Trial:
        return cls(**(raw | {"hyperparameters": Hyperparameters.from_json(raw["hyperparameters"])}))


@dataclass(frozen=True)
class Candidate:
    """A trial in the final race.

    ``search`` is its objective on the search's inputs, ``expected`` what the choice takes it for (the model's mean, or
    the same), ``holdout`` the one on held-out inputs (None unless all tasks were scored), ``pooled`` what both say
    together. ``tasks`` counts the tasks scored on held-out inputs; a trial ``dropped`` left the race after them.
    """

    trial: int
    search: float
    expected: float
    holdout: float | None
    pooled: float
    tasks: int
    dropped: bool


@dataclass(frozen=True)
class Choice:
    """How the final trial was chosen.

    ``method`` is the recipe's ``choice``; ``trial`` won, ``observed`` has the best observed score. After a race,
    ``share`` is the share of validation inputs it was run on, ``candidates`` its entrants, best first, and ``tasks``
    the number of tasks of the study.
    """

    method: str
    trial: int
    observed: int
    share: float = 0.0
    candidates: list[Candidate] = field(default_factory=list)
    tasks: int = 0

    @property
    def used(self) -> int:
        """Held-out task scores measured."""
        return sum(c.tasks for c in self.candidates)

    @property
    def saved(self) -> int:
        """Held-out task scores that dropping trials made unnecessary."""
        return len(self.candidates) * self.tasks - self.used

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Choice:
        return cls(**(raw | {"candidates": [Candidate(**c) for c in raw["candidates"]]}))


@dataclass(frozen=True)
class StudyResult:
    """What a tuning run found.

    ``validation`` and ``test`` give `Score` lists by model name: "anchor", "default", "best", "base" and, for the
    experts, "experts" (each task scored by its own expert). ``test`` is empty where no test data were given.
    ``paths`` names the files written: "study", "checkpoint", "card", "report". ``goal`` is the study's
    `bmm.search.goal.Goal` as JSON. Of completed trials, by number: ``objectives`` gives the values of a study with
    several objectives by name, ``violations`` what a study's floors are missed by in all (0: every floor holds).
    ``choice`` says how the best trial was chosen, where that was not by the observed score alone.
    """

    best: Trial
    trials: list[Trial]
    validation: dict[str, list[Score]]
    test: dict[str, list[Score]]
    paths: dict[str, str]
    recipe: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    goal: dict[str, Any] = field(default_factory=dict)
    objectives: dict[int, dict[str, float]] = field(default_factory=dict)
    violations: dict[int, float] = field(default_factory=dict)
    choice: Choice | None = None

    @property
    def hyperparameters(self) -> Hyperparameters:
        return self.best.hyperparameters

    def mean(self, model: str, split: Literal["validation", "test"] = "test") -> float:
        """Mean raw score over the tasks."""
        scores = getattr(self, split)[model]
        return sum(s.value for s in scores) / len(scores)

    def pareto(self) -> list[tuple[Trial, dict[str, float]]]:
        """The trials no other trial beats in one objective without losing in another, with their objectives by name.

        Highest first in the first objective. Trials that break a floor are left out, unless all do.

        Raises `StudyError` for a study of one objective.
        """
        if not self.objectives:
            raise StudyError("the study has one objective, so no Pareto front", "tune with --objectives A,B")
        kept = [n for n in self.objectives if not self.violations.get(n)] or list(self.objectives)
        points = [list(self.objectives[n].values()) for n in kept]
        front = sorted(non_dominated(points), key=lambda i: points[i], reverse=True)
        by_number = {t.number: t for t in self.trials}
        return [(by_number[kept[i]], self.objectives[kept[i]]) for i in front]

    def gap_closed(self, split: Literal["validation", "test"] = "test") -> float:
        """(best - anchor) / (experts - anchor) of the mean scores; NaN where the experts do not beat the anchor."""
        anchor, experts = self.mean("anchor", split), self.mean("experts", split)
        return (self.mean("best", split) - anchor) / (experts - anchor) if experts > anchor else math.nan

    def analysis(self) -> Any:
        """What the trials tell of the hyperparameters and of themselves: see `bmm.analyse`."""
        import bmm  # a convenience that looks up at the whole package

        return bmm.analyse(self)

    def to_json(self) -> dict[str, Any]:
        return {
            "best": self.best.to_json(),
            "trials": [t.to_json() for t in self.trials],
            "validation": {k: [asdict(s) for s in v] for k, v in self.validation.items()},
            "test": {k: [asdict(s) for s in v] for k, v in self.test.items()},
            "paths": dict(self.paths),
            "recipe": dict(self.recipe),
            "seconds": dict(self.seconds),
            "goal": dict(self.goal),
            "objectives": {str(n): dict(v) for n, v in self.objectives.items()},
            "violations": {str(n): v for n, v in self.violations.items()},
            "choice": asdict(self.choice) if self.choice else None,
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> StudyResult:
        return cls(
            best=Trial.from_json(raw["best"]),
            trials=[Trial.from_json(t) for t in raw["trials"]],
            validation={k: [Score(**s) for s in v] for k, v in raw["validation"].items()},
            test={k: [Score(**s) for s in v] for k, v in raw["test"].items()},
            paths=raw["paths"],
            recipe=with_new_names(raw["recipe"]),
            seconds=raw.get("seconds", {}),
            goal=raw.get("goal", {}),
            objectives={int(n): v for n, v in raw.get("objectives", {}).items()},
            violations={int(n): v for n, v in raw.get("violations", {}).items()},
            choice=Choice.from_json(raw["choice"]) if raw.get("choice") else None,
        )


@dataclass(frozen=True)
class CalibrationRow:
    """One model on one task: ``n`` inputs, accuracy, mean NLL (nats), expected calibration error."""

    model: str
    split: str
    task: str
    n: int
    accuracy: float
    nll: float
    ece: float


@dataclass(frozen=True)
class Calibration:
    """What `bmm.calibrate` found.

    ``rows`` has every model of `MODELS`, split ("validation" and, where there are data, "test") and task. ``sigma`` is
    the posterior's noise, 0 where noise did not lower the validation NLL; ``noise`` the size of it: the root mean
    square of its effect on the weights over that of the tuned merge's task vector. ``search`` lists (sigma, validation
    NLL) as tried, ``temperatures`` one number a task, ``trial`` is the study's.
    """

    study: str
    trial: int
    samples: int
    seed: int
    sigma: float
    noise: float
    temperatures: dict[str, float]
    search: list[tuple[float, float]]
    rows: list[CalibrationRow]

    MODELS: ClassVar[tuple[str, ...]] = ("mean", "ensemble", "temperature", "experts")

    @property
    def splits(self) -> list[str]:
        """The splits measured: validation, then test."""
        return list(dict.fromkeys(row.split for row in self.rows))

    def of(self, model: str, split: str) -> list[CalibrationRow]:
        """The rows of one model on one split, one a task."""
        return [row for row in self.rows if (row.model, row.split) == (model, split)]

    def mean(self, model: str, split: str) -> CalibrationRow:
        """Means over the tasks; ``n`` is the sum."""
        rows = self.of(model, split)
        means = [sum(getattr(row, key) for row in rows) / len(rows) for key in ("accuracy", "nll", "ece")]
        return CalibrationRow(model, split, "mean", sum(row.n for row in rows), *means)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"mean": [asdict(self.mean(m, s)) for s in self.splits for m in self.MODELS]}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Calibration:
        kept = {k: v for k, v in raw.items() if k != "mean"}
        rows = [CalibrationRow(**row) for row in raw["rows"]]
        return cls(**(kept | {"rows": rows, "search": [(s, v) for s, v in raw["search"]]}))
