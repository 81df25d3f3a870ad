"""A study that costs milliseconds: the validation scores of a real one, interpolated from a table of measured points.

Each task's score is a Gaussian process through the table (`collect.py`), and the part of it that the process took for
noise is put back as a fixed function of the point, so that engines meet the roughness of the real objective too.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from bmm.records import Hyperparameters, Trial
from bmm.search import gp
from bmm.search.space import Parameter, Space
from bmm.search.surrogate import Surrogate

Array = NDArray[np.float64]
FIT_POINTS = 500
"""Points the hyperparameters are fitted on, half of them the best; all points are interpolated."""


class Problem:
    """A table as a study's objective; ``space``, ``tasks``, ``reference`` are the real study's."""

    def __init__(self, path: Path, seed: int = 0) -> None:
        with np.load(path) as table:
            self.units, shares = table["units"].astype(float), table["scores"].astype(float) / table["reference"]
            columns = (table["parameters"].tolist(), table["lows"], table["highs"], table["defaults"])
        self.name = path.stem
        self.space = Space(
            tuple(Parameter(n, float(a), float(b), float(c)) for n, a, b, c in zip(*columns, strict=True))
        )
        self.tasks = [f"t{k}" for k in range(shares.shape[1])]
        self.objectives = shares.mean(1)  # (n,)
        best = np.argsort(-self.objectives)[: FIT_POINTS // 2]
        others = np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(len(shares)), best))
        chosen = np.concatenate([best, others[: FIT_POINTS - len(best)]])
        differences = gp.squared_differences(self.units[chosen])
        self._models = []
        for column in shares.T:
            standard, *_ = gp.standardised(column)  # (n,)
            hyper = gp.fit(differences, standard[chosen], iterations=60)
            self._models.append(Surrogate(self.units, column, hyper))
        self._noise = np.array([model.noise for model in self._models])  # (T,)

    def smooth(self, unit: Array) -> Array:
        """Each task's share of its expert's score, without the noise: (T,)."""
        return np.array([model.mean(unit[None])[0] for model in self._models])

    def scores(self, unit: Array) -> dict[str, float]:
        """What a trial at the point sees, by task."""
        key = hashlib.sha256(np.round(unit, 6).tobytes()).digest()
        noise = np.random.default_rng(int.from_bytes(key[:8], "little")).standard_normal(len(self.tasks))
        return dict(zip(self.tasks, (self.smooth(unit) + self._noise * noise).tolist(), strict=True))

    def trial(self, number: int, kind: str, point: Hyperparameters) -> Trial:
        scores = self.scores(self.space.to_unit(self.space.point_of(point)))
        value = math.fsum(scores.values()) / len(scores)
        return Trial(number, kind, "completed", point, scores, value)  # type: ignore[arg-type]

    def default(self) -> float:
        """The smooth objective of the default, where every search starts."""
        return float(self.smooth(self.space.to_unit(self.space.point_of(self.space.default()))).mean())

    def optimum(self, starts: int = 8) -> float:
        """The highest smooth objective that L-BFGS finds from the best points of the table."""
        bounds = [(0.0, 1.0)] * len(self.space)
        ends = [
            minimize(
                lambda u: -self.smooth(u).mean(),
                self.units[k],
                method="L-BFGS-B",
                bounds=bounds,
                options={"maxiter": 40},
            )
            for k in np.argsort(-self.objectives)[:starts]
        ]
        return -float(min(end.fun for end in ends))
