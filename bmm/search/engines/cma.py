"""CMA-ES, through the package `cma`: a population around a mean that moves. No model; for comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bmm.records import Trial
from bmm.search.engines.common import ModelEngine
from bmm.search.space import UnitPoint

Array = NDArray[np.float64]

POPULATION = 6
"""Trials a generation. Small, and so is the first step: budgets are some ten generations (docs/LOG.md)."""

STEP = 0.1
"""The first standard deviation, of a unit cube's edge."""

_SAME = 1e-5  # a row this close to a candidate of the replay is that candidate, rounded


class CmaEngine(ModelEngine):
    """The covariance matrix adaptation evolution strategy (arXiv 1604.00772) from the default point on.

    Every suggestion replays the study: its searched rows, in the order of their numbers, are the generations. A row
    that is not the point the replay drew (it was suggested while others were pending, or by the fallback) is told as a
    solution from outside, whose step the strategy may shorten. Objectives are told as ranks, which is all it uses;
    a failed or pending row ranks behind its whole generation, a stopped one by its forecast. A generation without an
    objective tells nothing.
    """

    key, name = "cma", "CMA-ES"
    first = 0

    def load(self) -> None:
        import cma  # noqa: F401

    def suggest(self, number: int, rows: Sequence[Trial], tried: Sequence[UnitPoint]) -> UnitPoint:
        searched = [(row, unit) for row, unit in zip(rows, tried, strict=True) if row.kind == "search"]
        generations = [searched[i : i + POPULATION] for i in range(0, len(searched) + 1, POPULATION)]
        normal = _Normal()
        strategy = self._strategy(normal)
        for index, generation in enumerate(generations):
            normal.generator = self.generator(index)
            drawn = strategy.ask()
            if len(generation) == POPULATION and any(row.objective is not None for row, _ in generation):
                points = [_matched(unit, candidate) for (_, unit), candidate in zip(generation, drawn, strict=True)]
                strategy.tell(points, ranks([row for row, _ in generation]))
        return np.asarray(drawn[len(generation)], dtype=np.float64)  # (d,)

    def _strategy(self, normal: _Normal) -> Any:
        import cma

        default = self.space.to_unit(self.space.point_of(self.space.default()))
        options = {
            "bounds": [0, 1],
            "popsize": POPULATION,
            "randn": normal,
            "seed": math.nan,  # it would seed NumPy's global generator
            "verbose": -9,
            "verb_log": 0,
        }
        return cma.CMAEvolutionStrategy(default, STEP, options)


class _Normal:
    """Normal draws of any shape, from a generator that is changed between generations."""

    generator: np.random.Generator

    def __call__(self, *shape: int) -> Array:
        return self.generator.standard_normal(shape)


def ranks(rows: Sequence[Trial]) -> list[float]:
    """0 for the best objective, equal for equals; rows without an objective come last."""
    order = sorted({row.objective for row in rows if row.objective is not None}, reverse=True)
    return [float(len(order) if row.objective is None else order.index(row.objective)) for row in rows]


def _matched(unit: UnitPoint, candidate: Array) -> Array:
    """The candidate itself where the row is it, so that the strategy knows it for its own."""
    return candidate if np.abs(unit - candidate).max() < _SAME else unit.copy()
