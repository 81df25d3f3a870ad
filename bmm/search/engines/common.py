"""What engines share: random streams, rounding, silence, quasi-random points, and the frame of a model-based engine."""

from __future__ import annotations

import contextlib
import logging
import random
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from bmm.records import Trial
from bmm.search.engine import Suggestion, cannot_load
from bmm.search.space import Space, UnitPoint

SOBOL_TRIALS = 5
"""Quasi-random trials between the default and the first model-based one."""

_RESOLUTION = 6
# Decimals of the unit cube a suggestion is rounded to: 1e-6 of a range changes no merge, and the last bits of an
# optimiser's answer need not survive another machine's arithmetic.
_STREAMS = {"sobol": 1, "fallback": 2, "model": 3, "population": 4}


class SobolEngine:
    """Scrambled Sobol points in the order of the trial numbers; a baseline, and every engine's fallback."""

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed = space, seed

    def ask(self, rows: Sequence[Trial]) -> Suggestion:
        return Suggestion(self.space.from_unit(self.unit_point(next_number(rows))))

    def unit_point(self, number: int, stream: str = "sobol") -> UnitPoint:
        """Point ``number`` of the named stream's sequence: ``(d,)``."""
        from scipy.stats import qmc

        generator = np.random.default_rng(_sequence(self.seed, stream))
        sequence = qmc.Sobol(len(self.space), scramble=True, seed=generator)
        if number:  # SciPy cannot go forward by nothing
            sequence.fast_forward(number)
        unit: UnitPoint = sequence.random(1)[0]  # (d,)
        return rounded(unit)


class ModelEngine:
    """Quasi-random points until ``first`` have an objective, then whatever `suggest` of a subclass makes of the rows.

    Where that raises, or repeats an earlier point, the suggestion is a Sobol point of another stream, with a notice.
    """

    key: str  # in `ENGINES`
    name: str
    first: int = SOBOL_TRIALS

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed = space, seed
        self._sobol = SobolEngine(space, seed)

    def suggest(self, number: int, rows: Sequence[Trial], tried: Sequence[UnitPoint]) -> UnitPoint:
        """The point of trial ``number``: (d,), where ``tried`` has the points of all ``rows``.

        The global generators are seeded from (seed, number) while it runs, see `seeded`.
        """
        raise NotImplementedError

    def load(self) -> None:
        """Imports what the engine needs, so that `ask` raises `StudyError` where that fails."""

    def ask(self, rows: Sequence[Trial]) -> Suggestion:
        number = next_number(rows)
        # Pending rows tell a model nothing yet: with many workers the quasi-random phase is longer.
        if sum(row.kind == "search" and row.objective is not None for row in rows) < self.first:
            return self._sobol.ask(rows)
        tried = [self.space.to_unit(self.space.point_of(row.hyperparameters)) for row in rows]
        try:
            with quiet():
                self.load()
        except ImportError as error:
            raise cannot_load(self.key, error) from error
        try:
            with quiet(), seeded(self.stream(number)):
                unit = self.suggest(number, rows, tried)
        except Exception as error:  # whatever a numerical library throws, the study goes on
            return self._fallback(number, f"{self.name} failed ({_in_short(error)})")
        unit = rounded(unit)
        if not np.isfinite(unit).all():
            return self._fallback(number, f"{self.name} suggested a point that is not finite")
        if any(np.abs(unit - other).max() < 0.5 * 10.0**-_RESOLUTION for other in tried):
            return self._fallback(number, f"{self.name} repeated an earlier point")
        return Suggestion(self.space.from_unit(unit))

    def stream(self, number: int) -> int:
        """The seed of trial ``number``'s own random numbers."""
        return int(_sequence(self.seed, "model", number).generate_state(1)[0])

    def generator(self, number: int) -> np.random.Generator:
        """Random numbers that belong to no trial: those of a population, say, which many trials share."""
        return np.random.default_rng(_sequence(self.seed, "population", number))

    def _fallback(self, number: int, why: str) -> Suggestion:
        unit = self._sobol.unit_point(number, "fallback")
        return Suggestion(self.space.from_unit(unit), f"{why}: took a quasi-random point instead")


def quasi_random(d: int, count: int, seed: int) -> UnitPoint:
    """Scrambled Sobol points: (count, d)."""
    from scipy.stats import qmc

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of counts that are no power of two
        points: UnitPoint = qmc.Sobol(d, scramble=True, seed=np.random.default_rng(seed)).random(count)
    return points


def _in_short(error: Exception) -> str:
    """The error's first line, cut: numerical libraries print whole tensors."""
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return line if len(line) <= 120 else line[:117] + "..."


def next_number(rows: Sequence[Trial]) -> int:
    return max((row.number for row in rows), default=-1) + 1


def rounded(unit: UnitPoint) -> UnitPoint:
    return np.asarray(np.round(np.clip(unit, 0.0, 1.0), _RESOLUTION), dtype=np.float64)


def _sequence(seed: int, stream: str, number: int = 0) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, _STREAMS[stream], number])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators of Python, NumPy and PyTorch start from ``seed``; afterwards they are as they were.

    Some library draws from them whatever generator it is given; PyTorch's on accelerators are left alone.
    """
    import torch

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
