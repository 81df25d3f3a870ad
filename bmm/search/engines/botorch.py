"""The default engine: Gaussian processes fitted by `bmm.search.gp`, BoTorch's noisy expected improvement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from bmm.records import Trial
from bmm.search.engines import goals
from bmm.search.engines.common import ModelEngine
from bmm.search.engines.processes import Array, processes_class
from bmm.search.goal import Goal
from bmm.search.space import Space, UnitPoint
from bmm.search.stopping import with_expected_scores

TASK_MODEL_TRIALS = 25
"""Below so many completed trials every task has a Gaussian process of its own; from there on the objective has one."""

_RESTARTS, _RAW_SAMPLES = 4, 256


class BotorchEngine(ModelEngine):
    """Bayesian optimisation of the unit cube.

    Few trials tell more where each task's scores are modelled by themselves and summed, many where the objective is
    modelled alone (docs/LOG.md has the figures); the engine changes from one to the other at
    `TASK_MODEL_TRIALS`. The acquisition is qLogNEI (arXiv 2310.20708), which takes noise in the best trial into
    account. Pending and failed rows count as pending: neither is suggested again. Of stopped trials the forecast
    counts. Goals other than a weighted mean are in `bmm.search.engines.goals`.
    """

    key, name = "botorch", "BoTorch"

    def __init__(
        self, space: Space, seed: int, shares: Mapping[str, float] | None = None, goal: Goal | None = None
    ) -> None:
        super().__init__(space, seed, shares)
        self.goal = goal

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
        if self.goal is not None:
            early = len(scored) < TASK_MODEL_TRIALS
            found = goals.acquisition(self.goal, x, scored, pending, by_task=early, seed=self.stream(number))
            return self._best(number, found, self._cube())
        model = self.model(number, x, scored)
        box = self.box(model, x, rows)
        found = qLogNoisyExpectedImprovement(model, torch.from_numpy(x), prune_baseline=True, X_pending=pending)
        return self._best(number, found, box)

    def model(self, number: int, x: Array, rows: Sequence[Trial]) -> Any:
        """A BoTorch model of the objective: ``x`` (n, d) are the points of ``rows``, completed or stopped."""
        return _model_class()(x, *self._outcomes(rows))

    def box(self, model: Any, x: Array, rows: Sequence[Trial]) -> Array:
        """Where the next point is looked for, lowest and highest corner: (2, d). ``rows`` are all there are."""
        return self._cube()

    def _cube(self) -> Array:
        return np.stack([np.zeros(len(self.space)), np.ones(len(self.space))])

    def _best(self, number: int, acquisition: Any, box: Array) -> UnitPoint:
        """The point of the box with the highest value: (d,)."""
        import torch
        from botorch.optim import optimize_acqf

        candidate, _ = optimize_acqf(
            acquisition,
            torch.from_numpy(box),
            q=1,
            num_restarts=_RESTARTS,
            raw_samples=_RAW_SAMPLES,
            options={"sample_around_best": True, "seed": self.stream(number) % 2**31},
        )
        unit: UnitPoint = candidate[0].numpy()  # (d,)
        return unit

    def _outcomes(self, rows: Sequence[Trial]) -> tuple[Array, Array]:
        """What is modelled, (m, n), and what each counts in the objective, (m,)."""
        tasks = [task for task, share in sorted(self.shares.items()) if share > 0]
        completed = sum(row.status == "completed" for row in rows)
        if completed > 1 and len(rows) < TASK_MODEL_TRIALS and len(tasks) > 1:  # a forecast needs two
            complete = with_expected_scores(rows, self.shares)
            scores = np.array([[row[task] for row in complete] for task in tasks])
            return scores, np.array([self.shares[task] for task in tasks])
        return np.array([[row.objective for row in rows]], dtype=np.float64), np.ones(1)


@lru_cache
def _model_class() -> Any:
    """`WeightedSum`, made when BoTorch is needed: importing it takes seconds."""
    import torch
    from botorch.posteriors.gpytorch import GPyTorchPosterior
    from gpytorch.distributions import MultivariateNormal

    class WeightedSum(processes_class()):  # type: ignore[misc, unused-ignore]
        """``sum_i coefficients[i] * f_i``, with an independent Gaussian process f_i for each outcome.

        Args:
            x: Inputs in the unit cube: (n, d).
            outcomes: One row of values an outcome: (m, n).
            coefficients: (m,).
        """

        alpha: torch.Tensor
        root: torch.Tensor

        def __init__(self, x: Array, outcomes: Array, coefficients: Array) -> None:
            super().__init__(x, outcomes)
            total = coefficients * self.deviations.numpy()
            unit = np.sqrt((total**2).sum()) or 1.0  # the sum's own scale: acquisitions expect values around one
            weights = torch.from_numpy(total / unit)  # (m,)
            self.alpha = self.alpha * weights[:, None, None]  # (m, n, 1)
            self.root = self.root * weights[:, None, None]  # (m, n, n)
            self.mean = float((weights * self.constants).sum())
            self.variances = (weights**2)[:, None, None]

        @property
        def num_outputs(self) -> int:
            return 1

        def posterior(self, X: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            """The joint posterior of the noiseless sum at ``X``, (..., q, d)."""
            scaled = X.unsqueeze(-3) * self.inverse  # (..., m, q, d)
            cross = self._kernel(scaled, self.scaled)  # (..., m, q, n)
            mean = self.mean + (cross @ self.alpha).squeeze(-1).sum(-2)  # (..., q)
            explained = cross @ self.root
            covariance = (self.variances * self._kernel(scaled, scaled) - explained @ explained.mT).sum(-3)
            jitter = 1e-8 * torch.eye(X.shape[-2], dtype=X.dtype)
            return GPyTorchPosterior(MultivariateNormal(mean, covariance + jitter))

    return WeightedSum
