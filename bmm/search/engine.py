"""Engines: what to try next, given what was tried. The only file that imports Ax and BoTorch.

An engine is a pure function of (space, seed, rows). It keeps no state between suggestions and is never told a result:
it reads the rows, so that a study killed at any moment and resumed goes on as if nothing had happened, and one that
keeps a population (CMA-ES, say) replays the rows. A row's number and seed name the random stream of its suggestion.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bmm.errors import RecipeError, StudyError, did_you_mean
from bmm.records import Trial
from bmm.search.space import Point, Space, UnitPoint

SOBOL_TRIALS = 5
"""Quasi-random trials between the default and the first model-based one."""

_RESOLUTION = 6
# Decimals of the unit cube a suggestion is rounded to: 1e-6 of a range changes no merge, and the last bits of an
# optimiser's answer need not survive another machine's arithmetic.
_STREAMS = {"sobol": 1, "fallback": 2, "model": 3}
_OBJECTIVE = "mean"


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


class SobolEngine:
    """Scrambled Sobol points in the order of the trial numbers; a baseline, and every engine's fallback."""

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed = space, seed

    def ask(self, rows: Sequence[Trial]) -> Suggestion:
        return Suggestion(self.space.from_unit(self.unit_point(_next_number(rows))))

    def unit_point(self, number: int, stream: str = "sobol") -> UnitPoint:
        """Point ``number`` of the named stream's sequence: ``(d,)``."""
        from scipy.stats import qmc

        sequence = qmc.Sobol(len(self.space), scramble=True, seed=_generator(self.seed, stream))
        if number:  # SciPy cannot go forward by nothing
            sequence.fast_forward(number)
        unit: UnitPoint = sequence.random(1)[0]  # (d,)
        return _rounded(unit)


class AxEngine:
    """Bayesian optimisation with Ax: `SOBOL_TRIALS` quasi-random points, then a Gaussian process on the objective.

    Every suggestion builds a fresh ``ax.api.client.Client`` from the rows: Ax refits its model for each suggestion
    anyway, and attaching 50 rows costs a tenth of that. The client's seed derives from (seed, trial number), because
    a client draws the same base samples for each suggestion it makes.

    Only the objective is given to Ax. The per-task scores stand in the rows; attached as tracking metrics they make
    Ax fit one more Gaussian process a task (2.8 s instead of 0.6 s a suggestion at 8 tasks and 50 rows) and move the
    suggestion by 1e-5. Failed rows become abandoned Ax trials, which it avoids as it does pending ones; trials marked
    failed would be suggested again. The anchor stands at the upper bound of lam (`Space.point_of`).

    Where Ax raises, or repeats an earlier point, the suggestion is a Sobol point of another stream, with a notice.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed = space, seed
        self._sobol = SobolEngine(space, seed)

    def ask(self, rows: Sequence[Trial]) -> Suggestion:
        number = _next_number(rows)
        if sum(row.kind == "search" and row.status != "failed" for row in rows) < SOBOL_TRIALS:
            return self._sobol.ask(rows)
        client_type, range_config = _import_ax()
        tried = [self.space.to_unit(self.space.point_of(row.hyperparameters)) for row in rows]
        try:
            with _quiet():
                unit = self._model_based(client_type, range_config, number, rows, tried)
        except Exception as error:  # whatever a numerical library throws, the study goes on
            return self._fallback(number, f"Ax failed ({type(error).__name__}: {error})")
        unit = _rounded(unit)
        if not np.isfinite(unit).all():
            return self._fallback(number, "Ax suggested a point that is not finite")
        if any(np.abs(unit - other).max() < 0.5 * 10.0**-_RESOLUTION for other in tried):
            return self._fallback(number, "Ax repeated an earlier point")
        return Suggestion(self.space.from_unit(unit))

    def _model_based(
        self, client_type: Any, range_config: Any, number: int, rows: Sequence[Trial], tried: Sequence[UnitPoint]
    ) -> UnitPoint:
        # Ax sees the unit cube under neutral names: group names may hold characters it gives a meaning to.
        names = [f"x{i}" for i in range(len(self.space))]
        seed = int(_sequence(self.seed, "model", number).generate_state(1)[0])
        client = client_type(random_seed=seed)
        client.configure_experiment(
            parameters=[range_config(name=n, bounds=(0.0, 1.0), parameter_type="float") for n in names]
        )
        client.configure_optimization(_OBJECTIVE)
        client.configure_generation_strategy(
            initialization_budget=0, initialization_random_seed=seed, initialize_with_center=False
        )
        for row, unit in zip(rows, tried, strict=True):
            index = client.attach_trial(dict(zip(names, unit.tolist(), strict=True)))
            if row.status == "completed":
                client.complete_trial(index, {_OBJECTIVE: row.objective})
            elif row.status == "failed":
                client.mark_trial_abandoned(index)
        (parameters,) = client.get_next_trials(1).values()
        return np.array([parameters[n] for n in names], dtype=np.float64)  # (d,)

    def _fallback(self, number: int, why: str) -> Suggestion:
        unit = self._sobol.unit_point(number, "fallback")
        return Suggestion(self.space.from_unit(unit), f"{why}: took a quasi-random point instead")


@dataclass(frozen=True)
class EngineRow:
    """What the rest of the program needs to know of an engine."""

    build: Callable[[Space, int], Engine]
    summary: str


ENGINES: dict[str, EngineRow] = {
    "ax": EngineRow(AxEngine, "Gaussian process and noisy expected improvement (Ax, BoTorch)"),
    "sobol": EngineRow(SobolEngine, "quasi-random points, no model"),
}


def build_engine(name: str, space: Space, seed: int) -> Engine:
    """The engine of that name, or `RecipeError` naming the close ones."""
    if name not in ENGINES:
        raise RecipeError(f"unknown engine {name!r}", did_you_mean(name, ENGINES))
    return ENGINES[name].build(space, seed)


def _next_number(rows: Sequence[Trial]) -> int:
    return max((row.number for row in rows), default=-1) + 1


def _rounded(unit: UnitPoint) -> UnitPoint:
    return np.asarray(np.round(np.clip(unit, 0.0, 1.0), _RESOLUTION), dtype=np.float64)


def _sequence(seed: int, stream: str, number: int = 0) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, _STREAMS[stream], number])


def _generator(seed: int, stream: str) -> np.random.Generator:
    return np.random.default_rng(_sequence(seed, stream))


def _import_ax() -> tuple[Any, Any]:
    try:
        with _quiet():
            from ax.api.client import Client
            from ax.api.configs import RangeParameterConfig
    except ImportError as error:
        raise StudyError(
            f"the engine 'ax' cannot be loaded: {error}", "reinstall ax-platform and botorch, or take --engine sobol"
        ) from error
    return Client, RangeParameterConfig


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ax and BoTorch on one thread, with gradients, without a word; everything as it was afterwards.

    Ax gives each of its loggers a level and a handler of its own, so only the global threshold silences them all. On
    matrices of this size a second thread makes BoTorch slower, on a busy machine by a factor of ten and more.
    """
    import torch

    threads, threshold = torch.get_num_threads(), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        logging.disable(threshold)
