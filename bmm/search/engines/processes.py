"""Independent Gaussian processes as a BoTorch model, without GPyTorch's kernels.

At a study's size the calls of GPyTorch and linear_operator cost more than their arithmetic. Everything here is batched
over outcomes, and the posterior is two tensors.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bmm.search import gp

Array = NDArray[np.float64]

_JITTER = 1e-8  # of a standardised outcome's variance


@lru_cache
def processes_class() -> Any:
    """`Processes`, made when BoTorch is needed: importing it takes seconds."""
    import torch
    from botorch.models.model import Model

    posterior_class = _posterior_class()

    class Processes(Model):  # type: ignore[misc, unused-ignore]
        """An independent Gaussian process for each outcome.

        Args:
            x: Inputs in the unit cube: (n, d).
            outcomes: One row of values an outcome: (m, n).
            prior: Of lengthscales; `bmm.search.gp.Prior.scaled` unless given.
        """

        def __init__(self, x: Array, outcomes: Array, prior: gp.Prior | None = None) -> None:
            super().__init__()
            differences = gp.squared_differences(x)
            standard, means, deviations = gp.standardised(outcomes)  # (m, n), (m, 1), (m, 1)
            fits = [gp.fit(differences, y, prior=prior) for y in standard]
            self.means, self.deviations = torch.from_numpy(means[:, 0]), torch.from_numpy(deviations[:, 0])  # (m,)
            self.constants = torch.tensor([f.mean for f in fits])  # (m,), single precision is enough
            self.inverse = torch.from_numpy(np.stack([1 / f.lengthscales for f in fits]))[:, None, :]  # (m, 1, d)
            self.scaled = torch.from_numpy(x) * self.inverse  # (m, n, d)
            kernel = self._kernel(self.scaled, self.scaled)
            kernel.diagonal(dim1=-2, dim2=-1).add_(torch.tensor([f.noise for f in fits])[:, None])
            factor = torch.linalg.cholesky(kernel)
            residual = torch.from_numpy(standard) - self.constants[:, None]  # (m, n)
            self.alpha = torch.cholesky_solve(residual[..., None], factor)  # (m, n, 1)
            eye = torch.eye(len(x), dtype=torch.float64).expand_as(factor)
            self.root = torch.linalg.solve_triangular(factor, eye, upper=False).mT.contiguous()  # (m, n, n)

        @staticmethod
        def _kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            """(..., p, d) and (..., r, d) to (..., p, r), without a tensor of all differences."""
            squares = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :] - 2 * a @ b.mT
            return torch.exp(-0.5 * squares.clamp_min(0))

        @property
        def num_outputs(self) -> int:
            return len(self.means)

        @property
        def batch_shape(self) -> torch.Size:
            return torch.Size()

        def posterior(self, X: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            """The joint posterior of the noiseless outcomes at ``X``, (..., q, d), in the outcomes' own units."""
            scaled = X.unsqueeze(-3) * self.inverse  # (..., m, q, d)
            cross = self._kernel(scaled, self.scaled)  # (..., m, q, n)
            mean = self.constants[:, None] + (cross @ self.alpha).squeeze(-1)  # (..., m, q)
            explained = cross @ self.root
            covariance = self._kernel(scaled, scaled) - explained @ explained.mT  # (..., m, q, q)
            return posterior_class(mean.mT, covariance, self.means, self.deviations)

    return Processes


@lru_cache
def _posterior_class() -> Any:
    import torch
    from botorch.posteriors.posterior import Posterior
    from botorch.sampling.get_sampler import GetSampler
    from botorch.sampling.normal import IIDNormalSampler, SobolQMCNormalSampler
    from linear_operator.utils.cholesky import psd_safe_cholesky

    class ProcessesPosterior(Posterior):  # type: ignore[misc, unused-ignore]
        """Jointly normal over q points, independent over m outcomes.

        Args:
            mean: Standardised: (..., q, m).
            covariance: Of each standardised outcome: (..., m, q, q).
            means, deviations: What standardised the outcomes: (m,).
        """

        def __init__(
            self, mean: torch.Tensor, covariance: torch.Tensor, means: torch.Tensor, deviations: torch.Tensor
        ) -> None:
            self._mean, self._covariance, self._means, self._deviations = mean, covariance, means, deviations

        @property
        def device(self) -> torch.device:
            return self._mean.device

        @property
        def dtype(self) -> torch.dtype:
            return self._mean.dtype

        @property
        def batch_shape(self) -> torch.Size:
            return self._mean.shape[:-2]

        @property
        def base_sample_shape(self) -> torch.Size:
            return self._mean.shape

        @property
        def batch_range(self) -> tuple[int, int]:
            return (0, -2)

        @property
        def mean(self) -> torch.Tensor:
            return self._means + self._deviations * self._mean  # (..., q, m)

        @property
        def variance(self) -> torch.Tensor:
            return self._covariance.diagonal(dim1=-2, dim2=-1).mT.clamp_min(0) * self._deviations**2  # (..., q, m)

        def _extended_shape(self, sample_shape: torch.Size = torch.Size()) -> torch.Size:  # noqa: B008
            return sample_shape + self._mean.shape

        def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: torch.Tensor) -> torch.Tensor:
            jitter = _JITTER * torch.eye(self._mean.shape[-2], dtype=self.dtype)
            factor = psd_safe_cholesky(self._covariance + jitter)  # (..., m, q, q)
            drawn = (factor @ base_samples.mT.unsqueeze(-1)).squeeze(-1).mT  # (..., q, m)
            return self._means + self._deviations * (self._mean + drawn)

        def rsample(self, sample_shape: torch.Size | None = None) -> torch.Tensor:
            shape = torch.Size([1]) if sample_shape is None else sample_shape
            return self.rsample_from_base_samples(shape, torch.randn(self._extended_shape(shape), dtype=self.dtype))

    @GetSampler.register(ProcessesPosterior)  # type: ignore[untyped-decorator, unused-ignore]
    def _sampler(posterior: Any, sample_shape: torch.Size, *, seed: int | None = None) -> Any:
        most = torch.quasirandom.SobolEngine.MAXDIM
        kind = SobolQMCNormalSampler if posterior.base_sample_shape[-2:].numel() <= most else IIDNormalSampler
        return kind(sample_shape=sample_shape, seed=seed)

    return ProcessesPosterior
