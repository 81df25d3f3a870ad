"""The default engine: Gaussian processes fitted by `bmm.search.gp`, BoTorch's noisy expected improvement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from bmm.records import Trial
from bmm.search import gp
from bmm.search.engines import goals
from bmm.search.engines.common import ModelEngine, quasi_random
from bmm.search.engines.processes import Array, processes_class
from bmm.search.goal import Goal
from bmm.search.prior import prior_of
from bmm.search.space import Space, UnitPoint

_STARTS, _CANDIDATES = 4, 512
_NEAR = 5  # so many of the best points have candidates around them
_STEPS = (0.05, 0.2)  # their distances, of the unit cube's edge
_MOVED = (0.2, 0.5, 1.0)  # the share of parameters that differ


class BotorchEngine(ModelEngine):
    """Bayesian optimisation of the unit cube.

    The objective has one Gaussian process, whose prior knows how fast it changes along lam and rho
    (`bmm.search.prior`). The acquisition is qLogNEI (arXiv 2310.20708), which takes noise in the best trial into
    account. Pending and failed rows count as pending: neither is suggested again. Of stopped trials the forecast
    counts. Goals other than a weighted mean are in `bmm.search.engines.goals`.
    """

    key, name = "botorch", "BoTorch"

    def __init__(self, space: Space, seed: int, goal: Goal | None = None) -> None:
        super().__init__(space, seed)
        self.goal, self.prior = goal, prior_of(space)

    def load(self) -> None:
        import botorch.acquisition.logei
        import botorch.optim  # noqa: F401

    def suggest(self, number: int, rows: Sequence[Trial], tried: Sequence[UnitPoint]) -> UnitPoint:
        import torch
        from botorch.acquisition.logei import qLogNoisyExpectedImprovement

        done = [row.objective is not None for row in rows]  # completed and stopped ones
        scored = [row for row, d in zip(rows, done, strict=True) if d]
        x = np.array([u for u, d in zip(tried, done, strict=True) if d])  # (n, d)
        waiting = [u for u, d in zip(tried, done, strict=True) if not d]
        pending = torch.from_numpy(np.array(waiting)) if waiting else None  # (w, d)
        objectives = np.array([row.objective for row in scored], dtype=np.float64)  # (n,)
        near = x[np.argsort(-objectives, kind="stable")[:_NEAR]]
        if self.goal is not None:
            seed = self.stream(number)
            found = goals.acquisition(self.goal, x, scored, pending, prior=self.prior, seed=seed)
            return self._best(number, found, self._cube(), near)
        model = self.model(number, x, scored)
        box = self.box(model, x, rows)
        found = qLogNoisyExpectedImprovement(model, torch.from_numpy(x), prune_baseline=True, X_pending=pending)
        return self._best(number, found, box, near)

    def model(self, number: int, x: Array, rows: Sequence[Trial]) -> Any:
        """A BoTorch model of the standardised objective: ``x`` (n, d) are the points of ``rows``, which have one."""
        objectives = np.array([[row.objective for row in rows]], dtype=np.float64)  # (1, n)
        return processes_class()(x, gp.standardised(objectives)[0], self.prior)  # acquisitions expect values around one

    def box(self, model: Any, x: Array, rows: Sequence[Trial]) -> Array:
        """Where the next point is looked for, lowest and highest corner: (2, d). ``rows`` are all there are."""
        return self._cube()

    def _cube(self) -> Array:
        return np.stack([np.zeros(len(self.space)), np.ones(len(self.space))])

    def _best(self, number: int, acquisition: Any, box: Array, near: Array) -> UnitPoint:
        """The point of the box with the highest value, (d,): L-BFGS from the best of many candidates."""
        import torch
        from botorch.optim import optimize_acqf

        candidates = torch.from_numpy(self._candidates(number, box, near))[:, None, :]  # (c, 1, d)
        with torch.no_grad():
            values = acquisition(candidates)  # (c,)
        point, _ = optimize_acqf(
            acquisition,
            torch.from_numpy(box),
            q=1,
            num_restarts=_STARTS,
            batch_initial_conditions=candidates[torch.topk(values, _STARTS).indices],
        )
        unit: UnitPoint = point[0].numpy()  # (d,)
        return unit

    def _candidates(self, number: int, box: Array, near: Array) -> Array:
        """Half of them all over the box, half steps from the points ``near`` (k, d) along some parameters: (c, d).

        BoTorch's own candidates around the best points leave a box that is smaller than the cube, and are refused.
        """
        low, high = box
        everywhere = low + (high - low) * quasi_random(len(low), _CANDIDATES // 2, self.stream(number))
        draw = np.random.default_rng(self.stream(number))
        shape = (_CANDIDATES // 2, len(low))
        lengths = np.exp(draw.uniform(math.log(_STEPS[0]), math.log(_STEPS[1]), (shape[0], 1)))
        steps = lengths * draw.standard_normal(shape)
        moved = draw.random(shape) < draw.choice(_MOVED, (shape[0], 1))
        around = near[draw.integers(len(near), size=shape[0])] + np.where(moved, steps, 0.0)
        return np.concatenate([everywhere, np.clip(around, low, high)])
