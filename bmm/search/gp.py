"""Gaussian-process regression fitted by its marginal likelihood in closed-form derivatives.

What GPyTorch spends half a second on (50 rows, 12 parameters) takes some 30 ms here: at this size a fit is two hundred
small Cholesky factorisations, and the cost is in the calls between them. The model is BoTorch's default one:
squared-exponential kernel with a lengthscale for each input, of unit variance on standardised outcomes, constant mean,
Gaussian noise. What is expected of lengthscales is a `Prior`; without one it is that of Hvarfner et al.
(arXiv 2402.02229), BoTorch's, as is what is expected of the noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

Array = NDArray[np.float64]

_MIN_NOISE, _MIN_LENGTHSCALE = 1e-4, 2.5e-2
_NOISE = (-4.0, 1.0)  # log-normal density of the noise variance of standardised outcomes


@dataclass(frozen=True)
class Hyper:
    """Of one outcome, in units of the standardised outcome: ``lengthscales`` (d,), ``noise`` variance, ``mean``."""

    lengthscales: Array
    noise: float
    mean: float


@dataclass(frozen=True)
class Prior:
    """A log-normal density of lengthscales.

    Attributes:
        location: Mean of the log lengthscales: (d,).
        scale: Their standard deviation.
    """

    location: Array
    scale: float

    @classmethod
    def scaled(cls, d: int) -> Prior:
        """Says little, and expects lengthscales to grow with the root of the dimension: BoTorch's."""
        return cls(np.full(d, math.sqrt(2) + 0.5 * math.log(d)), math.sqrt(3))

    @classmethod
    def around(cls, lengthscales: Array, spread: float) -> Prior:
        """With its mode at ``lengthscales`` (d,); ``spread`` is the standard deviation of their logs."""
        return cls(np.log(lengthscales) + spread**2, spread)


def standardised(y: Array) -> tuple[Array, Array, Array]:
    """Outcomes (..., n) of mean 0 and standard deviation 1, their means and their deviations (..., 1).

    What is constant (but for rounding) has the deviation 1, as has a single outcome.
    """
    means = y.mean(-1, keepdims=True)
    deviations = y.std(-1, ddof=1, keepdims=True) if y.shape[-1] > 1 else np.ones_like(means)
    deviations = np.where(deviations > 1e-12 * (1 + np.abs(means)), deviations, 1.0)
    return (y - means) / deviations, means, deviations


def squared_differences(x: Array) -> Array:
    """``(x[i, k] - x[j, k])^2`` for ``x`` of shape (n, d): ``(d, n, n)``."""
    return np.ascontiguousarray((x[:, None, :] - x[None, :, :]).transpose(2, 0, 1) ** 2)


class Loss:
    """Minus the log of the posterior density of ``(log lengthscales, log noise, mean)``, (d + 2,), and its gradient.

    Densities of lengthscales and noise are taken in the parameters themselves, not their logarithms, as BoTorch does.
    Arguments as those of `fit`.
    """

    def __init__(
        self, differences: Array, y: Array, variances: Array | None = None, prior: Prior | None = None
    ) -> None:
        self.d, self.n, _ = differences.shape
        self.flat = differences.reshape(self.d, self.n**2)
        self.y = y
        self.known = np.zeros(self.n) if variances is None else variances
        self.prior = prior or Prior.scaled(self.d)
        self._diagonal = np.arange(self.n)

    def __call__(self, theta: Array) -> tuple[float, Array]:
        d, n = self.d, self.n
        logs, log_noise, mean = theta[:d], theta[d], theta[d + 1]
        inverse = np.exp(-2 * logs)  # (d,)
        kernel = np.exp(-0.5 * (inverse @ self.flat)).reshape(n, n)
        noisy = kernel.copy()
        noisy[self._diagonal, self._diagonal] += self.known + math.exp(log_noise)
        try:
            factor = cho_factor(noisy, lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            return 1e10, np.zeros_like(theta)
        residual = self.y - mean
        alpha = cho_solve(factor, residual, check_finite=False)  # (n,)
        precision = cho_solve(factor, np.eye(n), check_finite=False)  # (n, n)
        value = 0.5 * residual @ alpha + np.log(np.diag(factor[0])).sum() + 0.5 * n * math.log(2 * math.pi)
        weight = np.outer(alpha, alpha) - precision  # -2 times the derivative by the noisy kernel
        gradient = np.empty_like(theta)
        gradient[:d] = -0.5 * inverse * (self.flat @ (weight * kernel).reshape(-1))
        gradient[d] = -0.5 * math.exp(log_noise) * np.trace(weight)
        gradient[d + 1] = -alpha.sum()
        scale, (noise_location, noise_scale) = self.prior.scale, _NOISE
        shift, noise_shift = (logs - self.prior.location) / scale, (log_noise - noise_location) / noise_scale
        value += 0.5 * shift @ shift + logs.sum() + 0.5 * noise_shift**2 + log_noise
        gradient[:d] += shift / scale + 1
        gradient[d] += noise_shift / noise_scale + 1
        return float(value), gradient


def fit(
    differences: Array,
    y: Array,
    variances: Array | None = None,
    iterations: int = 200,
    prior: Prior | None = None,
) -> Hyper:
    """The hyperparameters with the highest posterior density.

    Args:
        differences: `squared_differences` of the inputs: (d, n, n).
        y: Standardised outcomes: (n,).
        variances: Known noise variances of the outcomes, added to the learned one: (n,).
        iterations: At most so many steps of L-BFGS.
        prior: Of lengthscales; `Prior.scaled` unless given.
    """
    d = len(differences)
    lengthscale = max(0.5 * math.sqrt(d), _MIN_LENGTHSCALE)
    start = np.array([math.log(lengthscale)] * d + [_NOISE[0], y.mean()])
    bounds = [(math.log(_MIN_LENGTHSCALE), math.log(1e4))] * d + [(math.log(_MIN_NOISE), math.log(10.0)), (-5.0, 5.0)]
    loss = Loss(differences, y, variances, prior)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": iterations})
    return Hyper(np.exp(found.x[:d]), math.exp(found.x[d]), float(found.x[d + 1]))
