"""Engines: what to try next, given what was tried.

An engine is a pure function of (space, seed, goal, rows). It keeps no state between suggestions and is never told a
result: it reads the rows, so that a study killed at any moment and resumed goes on as if nothing had happened, and one
that keeps a population (CMA-ES, say) replays the rows. A row's number and seed name the random stream of its
suggestion. The engines themselves are in `bmm.search.engines`, each imported when it is built; only they may import
Ax, BoTorch and the like.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bmm.errors import RecipeError, StudyError, did_you_mean
from bmm.records import Trial
from bmm.search.goal import Goal
from bmm.search.space import Point, Space


@dataclass(frozen=True)
class Suggestion:
    """A point to try, and, where the engine could not do as it is meant to, why."""

    point: Point
    notice: str = ""


class Engine(Protocol):
    """Suggests the trial that follows ``rows`` (all rows of the study, by number, whatever their status).

    Failed rows must not be suggested again; pending rows are being evaluated elsewhere and count as tried.
    """

    def ask(self, rows: Sequence[Trial]) -> Suggestion: ...


@dataclass(frozen=True)
class EngineRow:
    """What the rest of the program needs to know of an engine: where its class is, what it is, what it needs.

    ``needs`` names modules that only ``extra`` of the distribution installs.
    """

    place: str
    summary: str
    needs: tuple[str, ...] = ()
    extra: str = ""
    goals: bool = False  # its class takes any goal; others maximise one number and see no task scores but for a mean

    @property
    def installed(self) -> bool:
        """Whether the modules it needs are there; none of them is imported."""
        return not self._missing()

    def require(self, name: str) -> None:
        """Raises `StudyError` where a module it needs is not installed."""
        if missing := self._missing():
            raise cannot_load(name, f"{' and '.join(missing)} not installed")

    def build(self, space: Space, seed: int, goal: Goal | None = None) -> Engine:
        module, _, name = self.place.partition(":")
        made = getattr(importlib.import_module(f"bmm.search.engines.{module}"), name)
        if goal is None or goal.plain:
            engine: Engine = made(space, seed)
            return engine
        return made(space, seed, goal) if self.goals else Penalised(made(space, seed), goal)

    def _missing(self) -> list[str]:
        return [module for module in self.needs if importlib.util.find_spec(module) is None]


class Penalised:
    """An engine without constraints under a goal that has some: breaking a floor costs `bmm.search.goal.PENALTY`."""

    def __init__(self, engine: Engine, goal: Goal) -> None:
        self.engine, self.goal = engine, goal

    def ask(self, rows: Sequence[Trial]) -> Suggestion:
        return self.engine.ask([self.goal.penalised(row) for row in rows])


ENGINES: dict[str, EngineRow] = {
    "botorch": EngineRow(
        "botorch:BotorchEngine",
        "Gaussian process under what is known of lam and rho, noisy expected improvement (BoTorch)",
        goals=True,
    ),
    "ax": EngineRow("ax:AxEngine", "Ax's client as it comes: Gaussian process of the mean, noisy expected improvement"),
    "turbo": EngineRow(
        "turbo:TurboEngine", "the model of botorch inside a trust region that moves and shrinks (TuRBO)"
    ),
    "saasbo": EngineRow(
        "saasbo:SaasboEngine",
        "fully Bayesian Gaussian process that expects few parameters to matter (SAASBO, BoTorch and NumPyro)",
        ("jax", "numpyro"),
        "saasbo",
    ),
    "cma": EngineRow("cma:CmaEngine", "evolution strategy from the default on, no model (CMA-ES)", ("cma",), "compare"),
    "tpe": EngineRow("tpe:TpeEngine", "tree-structured Parzen estimator (Optuna)", ("optuna",), "compare"),
    "sobol": EngineRow("common:SobolEngine", "quasi-random points, no model"),
}


def build_engine(name: str, space: Space, seed: int, goal: Goal | None = None) -> Engine:
    """The engine of that name, or `RecipeError` naming the close ones.

    ``goal`` is what the study is after where that is another goal than a weighted mean, which the objectives tell.
    """
    return engine_row(name).build(space, seed, goal)


def engine_row(name: str) -> EngineRow:
    """The row of `ENGINES`, or `RecipeError` naming the close ones."""
    if name not in ENGINES:
        raise RecipeError(f"unknown engine {name!r}", did_you_mean(name, ENGINES))
    return ENGINES[name]


def cannot_load(name: str, why: object) -> StudyError:
    """The error of an engine whose libraries are missing or broken, with what to install."""
    extra = ENGINES[name].extra
    package = f"bmm-tuner[{extra}]" if extra else "bmm-tuner"
    return StudyError(
        f"the engine {name!r} cannot be loaded: {why}",
        f"pip install --upgrade '{package}', or take another --engine ({', '.join(n for n in ENGINES if n != name)})",
    )
