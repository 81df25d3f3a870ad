"""A trust region around the best point, that grows with success and shrinks without: TuRBO with one region."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bmm.records import Trial
from bmm.search.engines.botorch import Array, BotorchEngine
from bmm.search.engines.common import SOBOL_TRIALS
from bmm.search.space import UnitPoint

FIRST_LENGTH, LONGEST, SHORTEST = 0.8, 1.6, 0.5**7
"""Edges of the region in the unit cube, the paper's; a region shorter than the shortest is given up for another."""

SUCCESSES = 3
"""So many improvements in a row double the edge."""

_IMPROVEMENT = 1e-3  # of the best objective; less is no success


@dataclass(frozen=True)
class Region:
    """The trust region after some rows of a study.

    ``start`` is its first row, ``designed`` how many of its quasi-random points have an objective, ``best`` its
    highest one.
    """

    start: int = 0
    length: float = FIRST_LENGTH
    successes: int = 0
    failures: int = 0
    designed: int = 0
    best: float = -math.inf

    def after(self, index: int, row: Trial, tolerance: int) -> Region:
        """The region once row ``index`` is known too; ``tolerance`` rows in a row without success halve the edge.

        A failed row is one without success, a pending one is nothing yet.
        """
        value = -math.inf if row.objective is None else row.objective
        known = replace(self, best=max(self.best, value))
        if row.status == "pending" or row.kind != "search":
            return known
        if self.designed < SOBOL_TRIALS:
            return replace(known, designed=self.designed + (row.objective is not None))
        if value > self.best + _IMPROVEMENT * abs(self.best):
            if self.successes + 1 < SUCCESSES:
                return replace(known, successes=self.successes + 1, failures=0)
            return replace(known, successes=0, failures=0, length=min(2 * self.length, LONGEST))
        if self.failures + 1 < tolerance:
            return replace(known, successes=0, failures=self.failures + 1)
        if self.length / 2 < SHORTEST:
            return Region(start=index + 1)
        return replace(known, successes=0, failures=0, length=self.length / 2)


def region_after(rows: Sequence[Trial], tolerance: int) -> Region:
    region = Region()
    for index, row in enumerate(rows):
        region = region.after(index, row, tolerance)
    return region


class TurboEngine(BotorchEngine):
    """TuRBO-1 (arXiv 1910.01739) with the model and the acquisition of `BotorchEngine`.

    The next point is looked for in a box around the region's best one, whose edges are the region's, longer along
    parameters with long lengthscales, shorter along others, of equal volume. Where the region has shrunk to nothing
    another begins, with quasi-random points, and only what follows is its own. The paper draws from the posterior
    (Thompson sampling) and waits for d failures; see `failures_tolerated`.
    """

    key, name = "turbo", "TuRBO"

    def suggest(self, number: int, rows: Sequence[Trial], tried: Sequence[UnitPoint]) -> UnitPoint:
        region = region_after(rows, failures_tolerated(len(self.space)))
        if region.start and region.designed < SOBOL_TRIALS:
            return self._sobol.unit_point(number)
        return super().suggest(number, rows[region.start :], tried[region.start :])

    def box(self, model: Any, x: Array, rows: Sequence[Trial]) -> Array:
        # `rows` begin where the region does, so that the count starts from there as well.
        length = region_after(rows, failures_tolerated(len(self.space))).length
        objectives = [row.objective for row in rows if row.objective is not None]
        center = x[int(np.argmax(objectives))]  # (d,)
        logs = -np.log(model.inverse[0, 0].numpy())  # (d,)
        half = 0.5 * length * np.exp(logs - logs.mean())  # (d,)
        return np.stack([np.clip(center - half, 0, 1), np.clip(center + half, 0, 1)])


def failures_tolerated(d: int) -> int:
    """Rows in a row without success before the region shrinks, for one suggestion at a time in ``d`` dimensions."""
    return max(4, math.ceil(d / 4))
