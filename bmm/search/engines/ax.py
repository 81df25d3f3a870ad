"""Ax as it comes: its client, its choice of model and acquisition. For comparison with the engine `botorch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bmm.errors import StudyError
from bmm.records import Trial
from bmm.search.engines.common import ModelEngine
from bmm.search.space import UnitPoint

_OBJECTIVE = "mean"


class AxEngine(ModelEngine):
    """Bayesian optimisation with Ax: a Gaussian process on the objective.

    Every suggestion builds a fresh ``ax.api.client.Client`` from the rows: Ax refits its model for each suggestion
    anyway. The client's seed derives from (seed, trial number), because a client draws the same base samples for each
    suggestion it makes.

    Only the objective is given to Ax: task scores attached as tracking metrics make it fit one more Gaussian process a
    task (2.8 s instead of 0.6 s a suggestion at 8 tasks and 50 rows) and move the suggestion by 1e-5. Failed rows
    become abandoned Ax trials, which it avoids as it does pending ones; trials marked failed would be suggested
    again. The anchor stands at the upper bound of lam (`Space.point_of`).
    """

    name = "Ax"

    def load(self) -> None:
        self._client, self._range = _import_ax()

    def suggest(self, number: int, rows: Sequence[Trial], tried: Sequence[UnitPoint]) -> UnitPoint:
        # Ax sees the unit cube under neutral names: group names may hold characters it gives a meaning to.
        names = [f"x{i}" for i in range(len(self.space))]
        seed = self.stream(number)
        client = self._client(random_seed=seed)
        client.configure_experiment(
            parameters=[self._range(name=n, bounds=(0.0, 1.0), parameter_type="float") for n in names]
        )
        client.configure_optimization(_OBJECTIVE)
        client.configure_generation_strategy(
            initialization_budget=0, initialization_random_seed=seed, initialize_with_center=False
        )
        for row, unit in zip(rows, tried, strict=True):
            index = client.attach_trial(dict(zip(names, unit.tolist(), strict=True)))
            if row.status in ("completed", "stopped"):
                client.complete_trial(index, {_OBJECTIVE: row.objective})
            elif row.status == "failed":
                client.mark_trial_abandoned(index)
        (parameters,) = client.get_next_trials(1).values()
        return np.array([parameters[n] for n in names], dtype=np.float64)  # (d,)


def _import_ax() -> tuple[Any, Any]:
    try:
        from ax.api.client import Client
        from ax.api.configs import RangeParameterConfig
    except ImportError as error:
        raise StudyError(
            f"the engine 'ax' cannot be loaded: {error}", "reinstall ax-platform and botorch, or take --engine botorch"
        ) from error
    return Client, RangeParameterConfig
