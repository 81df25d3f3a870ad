"""Refinement inside one study: first one (lam, rho) for the whole model, then one a role, then one a group.

A *stage* ties groups of the study's space together: all groups of one coarse group share its pair. What a stage
suggests is therefore a point of the study's own space, and its rows are ordinary rows. Stages are nested, so that every
row of an earlier stage also lies in the tied space of a later one, which sees all of them and starts from the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bmm.records import Hyperparameters, Trial
from bmm.search.engine import Engine, Suggestion
from bmm.search.goal import Goal
from bmm.search.space import LOG10_LAM, RHO, Parameter, Point, Space

Coarse = Mapping[str, str]
"""By group of the study, the coarse group whose pair it shares."""

SHARES = {2: (0.2, 0.8), 3: (0.2, 0.4, 0.4)}
"""By number of stages, the part of the budget that each is given."""


@dataclass(frozen=True)
class Stage:
    """The stage that begins with trial ``first`` and ties the groups that ``coarse`` gives the same name."""

    first: int
    coarse: Coarse

    def space(self, whole: Space, start: Hyperparameters) -> Space:
        """The tied space; ``start``, a point of the whole space that lies in it, is its default."""
        default = whole.point_of(start)
        tied: dict[str, Parameter] = {}
        for parameter in whole.parameters:
            name = self._tied(parameter.name)
            tied.setdefault(name, replace(parameter, name=name, default=default[parameter.name]))
        return Space(tuple(tied.values()))

    def project(self, row: Trial) -> Trial:
        """A row of the study, one that lies in the tied space, as a row of that space."""
        point = row.hyperparameters
        lam = {self.coarse[group]: value for group, value in point.lam.items()}
        rho = {self.coarse[group]: value for group, value in point.rho.items()}
        return replace(row, hyperparameters=replace(point, lam=lam, rho=rho))

    def embed(self, point: Point, whole: Space) -> Point:
        """A point of the tied space as one of the whole space."""
        return {parameter.name: point[self._tied(parameter.name)] for parameter in whole.parameters}

    def _tied(self, name: str) -> str:
        kind, _, group = name.partition("/")
        return f"{kind}/{self.coarse[group]}" if kind in (LOG10_LAM, RHO) else name

    def to_json(self) -> list[Any]:
        return [self.first, dict(self.coarse)]

    @classmethod
    def from_json(cls, raw: Sequence[Any]) -> Stage:
        return cls(*raw)


def plan(
    coarse: Sequence[Coarse], groups: Sequence[str], budget: int, recorded: Sequence[Any] | None = None
) -> list[Stage]:
    """The stages of a study of ``budget`` trials: ``coarse`` ones, nested and coarsest first, then the groups' own.

    A study whose budget grew keeps the stages it ``recorded`` when it was begun, and goes on in the last one.
    """
    every = [*coarse, {group: group for group in groups}]
    if recorded is not None and len(recorded) == len(every):
        firsts = [Stage.from_json(stage).first for stage in recorded]
    else:
        shares = SHARES[len(every)]
        firsts = [round(math.fsum(shares[:number]) * budget) for number in range(len(every))]
    return [Stage(first, ties) for first, ties in zip(firsts, every, strict=True)]


class Refined:
    """An engine that goes through stages, each with an engine of its own in the stage's tied space.

    Args:
        space: The study's.
        stages: In order, the first one from trial 0 on.
        goal: Says which row is the best, from which a stage starts.
        build: Makes the engine of a space.
    """

    def __init__(self, space: Space, stages: Sequence[Stage], goal: Goal, build: Callable[[Space], Engine]) -> None:
        self.space, self.stages, self.goal, self.build = space, list(stages), goal, build

    def ask(self, rows: Sequence[Trial]) -> Suggestion:
        number = max((row.number for row in rows), default=-1) + 1
        stage = max((s for s in self.stages if s.first <= number), key=lambda s: s.first)
        earlier = [row for row in rows if row.number < stage.first and row.status == "completed"]
        start = max(earlier, key=self.goal.rank).hyperparameters if earlier else self.space.default()
        engine = self.build(stage.space(self.space, start))
        suggestion = engine.ask([self._seen(row, stage) for row in rows])
        return replace(suggestion, point=stage.embed(suggestion.point, self.space))

    @staticmethod
    def _seen(row: Trial, stage: Stage) -> Trial:
        """The row as the stage's engine sees it: searched rows are those of the stage, with a first design of its own,
        and what came before was given."""
        before = row.kind == "search" and row.number < stage.first
        return replace(stage.project(row), kind="default" if before else row.kind)
