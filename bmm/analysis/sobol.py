"""Sobol indices of a Gaussian process's posterior mean, in closed form.

With a squared-exponential kernel the mean is ``c + sum_j alpha_j prod_k e_k(u_k, x_jk)``, and every integral over the
unit cube is a product of one-dimensional ones (Oakley & O'Hagan, JRSS B 66, 2004; for the indices, Saltelli et al.,
Computer Physics Communications 181, 2010). With

    I_k[j]     = int_0^1 e_k(u, x_jk) du
    J_k[j, j'] = int_0^1 e_k(u, x_jk) e_k(u, x_j'k) du
    C_k        = J_k - I_k I_k^T

the variance is ``alpha^T (prod_k J_k - prod_k I_k I_k^T) alpha``; the part of input i alone has ``C_i`` for its own
factor and ``I_k I_k^T`` for the others', and the part that vanishes when i is averaged out has ``C_i`` and ``J_k``. No
sampling, hence no sampling error and no seed.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import erf

from bmm.search.gp import Array
from bmm.search.surrogate import Surrogate

_FLAT = 1e-8
"""A mean whose standard deviation is below so much of the outcomes' own does not vary."""


def sobol_indices(surrogate: Surrogate) -> tuple[Array, Array]:
    """First-order and total indices of the posterior mean over the unit cube: two arrays (d,); zero if flat."""
    x, alpha = surrogate.x.T, surrogate.alpha  # (d, n), (n,)
    scale = surrogate.hyper.lengthscales[:, None]  # (d, 1)
    single = math.sqrt(math.pi / 2) * scale * _between(x, math.sqrt(2) * scale)  # (d, n)
    outer = single[:, :, None] * single[:, None, :]  # (d, n, n)
    middle = (x[:, :, None] + x[:, None, :]) / 2
    away = (x[:, :, None] - x[:, None, :]) / (2 * scale[..., None])
    joint = math.sqrt(math.pi) / 2 * scale[..., None] * _between(middle, scale[..., None]) * np.exp(-(away**2))
    variance = float(alpha @ (joint.prod(0) - outer.prod(0)) @ alpha)
    if variance <= _FLAT**2:
        return np.zeros(len(x)), np.zeros(len(x))
    own = joint - outer
    first = np.array([alpha @ (o * rest) @ alpha for o, rest in zip(own, _without_each(outer), strict=True)])
    total = np.array([alpha @ (o * rest) @ alpha for o, rest in zip(own, _without_each(joint), strict=True)])
    return np.clip(first / variance, 0.0, 1.0), np.clip(total / variance, 0.0, 1.0)


def _between(centre: Array, width: Array) -> Array:
    """``2 / sqrt(pi)`` times the integral of ``exp(-((u - centre) / width)^2)`` over [0, 1], over ``width``."""
    value: Array = erf((1 - centre) / width) + erf(centre / width)
    return value


def _without_each(factors: Array) -> Array:
    """Products over the first axis with one factor left out, without dividing by what may be zero: (d, n, n)."""
    ones = np.ones_like(factors[:1])
    before = np.concatenate([ones, factors[:-1]]).cumprod(0)
    after = np.concatenate([ones, factors[:0:-1]]).cumprod(0)[::-1]
    product: Array = before * after
    return product
