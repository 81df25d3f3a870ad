"""Optuna's tree-structured Parzen estimator. For comparison with the Gaussian processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bmm.records import Trial
from bmm.search.engines.common import ModelEngine
from bmm.search.space import UnitPoint


class TpeEngine(ModelEngine):
    """Multivariate TPE (arXiv 2304.11127): densities of good and of bad points, and the highest ratio of the two.

    Every suggestion builds an Optuna study in memory from the rows. Pending rows are running trials, which count as
    bad ones ("constant liar"); failed rows are failed trials, which Optuna leaves out of both densities; of
    stopped rows the forecast counts.
    """

    key, name = "tpe", "TPE"

    def load(self) -> None:
        import optuna  # noqa: F401

    def suggest(self, number: int, rows: Sequence[Trial], tried: Sequence[UnitPoint]) -> UnitPoint:
        import optuna

        sampler = optuna.samplers.TPESampler(
            multivariate=True, constant_liar=True, n_startup_trials=0, seed=self.stream(number)
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        names = [f"x{i:04d}" for i in range(len(self.space))]
        box: dict[str, Any] = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in names}
        states = {"completed": "COMPLETE", "stopped": "COMPLETE", "failed": "FAIL", "pending": "RUNNING"}
        for row, unit in zip(rows, tried, strict=True):
            trial = optuna.trial.create_trial(
                state=optuna.trial.TrialState[states[row.status]],
                params=dict(zip(names, unit.tolist(), strict=True)),
                distributions=box,
                value=row.objective,
            )
            study.add_trial(trial)
        parameters = study.ask(box).params
        return np.array([parameters[name] for name in names], dtype=np.float64)  # (d,)
