"""What a fitted Gaussian process says: means, joint uncertainty of sums, partial dependence, leave-one-out."""

from __future__ import annotations

import math

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.spatial.distance import cdist

from bmm.search import gp
from bmm.search.gp import Array, Hyper, Prior


class Surrogate:
    """The Gaussian process of `bmm.search.gp` conditioned on outcomes ``y`` (n,) at unit points ``x`` (n, d).

    All answers are in the units of ``y`` and, but for `leave_one_out`, about the function without its noise.

    Attributes:
        hyper: Fitted to the data under ``prior`` unless given; in units of the standardised outcomes
            ``(y - centre) / scale``.
        alpha: (noisy kernel)^-1 (standardised outcome - mean): (n,).
    """

    def __init__(self, x: Array, y: Array, hyper: Hyper | None = None, prior: Prior | None = None) -> None:
        self.x, self.y, self._prior = x, y, prior
        standard, centre, scale = gp.standardised(y)  # (n,), (1,), (1,)
        self.centre, self.scale = float(centre[0]), float(scale[0])
        self.hyper = gp.fit(gp.squared_differences(x), standard, prior=prior) if hyper is None else hyper
        self.residual = standard - self.hyper.mean  # (n,)
        noisy = self.kernel(x, x) + self.hyper.noise * np.eye(len(x))
        self.factor: Array = cho_factor(noisy, lower=True)[0]
        self.alpha: Array = cho_solve((self.factor, True), self.residual)

    @property
    def noise(self) -> float:
        """Standard deviation of the noise."""
        return self.scale * math.sqrt(self.hyper.noise)

    def kernel(self, a: Array, b: Array) -> Array:
        """Of unit points ``a`` (p, d) and ``b`` (r, d): (p, r)."""
        inverse = 1 / self.hyper.lengthscales
        kernel: Array = np.exp(-0.5 * cdist(a * inverse, b * inverse, "sqeuclidean"))
        return kernel

    def mean(self, z: Array) -> Array:
        """Expected values at unit points ``z`` (p, d): (p,)."""
        mean: Array = self.centre + self.scale * (self.hyper.mean + self.kernel(z, self.x) @ self.alpha)
        return mean

    def combination(self, z: Array, weights: Array) -> tuple[float, float]:
        """Mean and standard deviation of ``sum_i weights[i] f(z[i])``, with all correlations; ``z`` (p, d)."""
        cross = weights @ self.kernel(z, self.x)  # (n,)
        mean, sd = self._moments(float(weights.sum()), float(weights @ self.kernel(z, z) @ weights), cross[None])
        return float(mean[0]), float(sd[0])

    def partial(self, k: int, grid: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of f averaged over the rows of ``x``, input ``k`` set to each of ``grid`` (g,).

        Partial dependence (Friedman, Annals of Statistics 29, 2001) over the points tried: two arrays (g,).
        """
        inverse = 1 / self.hyper.lengthscales
        scaled = np.delete(self.x * inverse, k, axis=1)  # (n, d - 1)
        others = np.exp(-0.5 * cdist(scaled, scaled, "sqeuclidean"))  # (n, n)
        own = np.exp(-0.5 * ((grid[:, None] - self.x[:, k]) * inverse[k]) ** 2)  # (g, n)
        return self._moments(1.0, float(others.mean()), own * others.mean(0))

    def leave_one_out(self) -> tuple[Array, Array]:
        """Mean and variance of every outcome (noise included) given all the others: two arrays (n,).

        Rasmussen & Williams, Gaussian Processes for Machine Learning, eqs. 5.10 to 5.12; the hyperparameters stay
        those fitted to all outcomes.
        """
        precision = np.diag(cho_solve((self.factor, True), np.eye(len(self.x))))  # (n,)
        return self.y - self.scale * self.alpha / precision, self.scale**2 / precision

    def cross_validated(self, folds: int) -> Array:
        """Expected outcomes (n,), every ``folds``-th point predicted by a model fitted, from scratch, without them."""
        fold = np.arange(len(self.y)) % folds
        means = np.empty(len(self.y))
        for number in range(min(folds, len(self.y))):
            out = fold == number
            means[out] = Surrogate(self.x[~out], self.y[~out], prior=self._prior).mean(self.x[out])
        return means

    def _moments(self, total: float, prior: float, cross: Array) -> tuple[Array, Array]:
        """Of combinations with weights of sum ``total``, prior variance ``prior``, covariances ``cross`` (g, n)."""
        mean = total * (self.centre + self.scale * self.hyper.mean) + self.scale * (cross @ self.alpha)  # (g,)
        explained = solve_triangular(self.factor, cross.T, lower=True)  # (n, g)
        variance = np.maximum(prior - (explained**2).sum(0), 0.0)
        return mean, self.scale * np.sqrt(variance)
