"""Points on a sphere known by their inner products alone: what SLERP, Multi-SLERP and the Karcher mean share.

Every mean of directions lies in the span of the points, ``sum_t c_t p_t``, and angles are functions of the (T, T)
matrix of inner products. So the kernels compute that matrix in float64, once, then work on the coefficients c (T,);
the tensors themselves, of any size, are read once more for the final sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .anchor import Parts

Space = Literal["weights", "task_vectors"]

CHUNK = 1 << 18
"""Entries of each point that are widened to float64 at a time."""

DEGENERATE = 1e-7
"""Sums of unit vectors shorter than this have no direction; angles closer than this to pi have none either."""


@dataclass(frozen=True)
class SphereMean:
    """A mean of T directions, and what finding it cost.

    ``coefficients`` (T,) float64 of the *unit* vectors: the mean direction is ``sum_t c_t p_t / |p_t|``, None where
    there is none (the directions cancel). ``residual``: length of the last tangent step in radians, 0 at the exact
    mean. ``iterations``: steps taken.
    """

    coefficients: Tensor | None
    residual: float
    iterations: int


def karcher_mean(cosines: Tensor, weights: Tensor, tolerance: float = 1e-7, iterations: int = 10) -> SphereMean:
    """The weighted Karcher (Riemannian, intrinsic) mean of T directions on the sphere.

    It minimises ``sum_t a_t angle(m, p_t)^2`` by steps of the exponential map along the mean of the logarithms
    ``log_m(p_t) = angle / sin(angle) (p_t - cos(angle) m)``, from the normalised weighted mean, until a step is no
    longer than ``tolerance`` radians. The mean is unique where all directions lie within one half-sphere's interior;
    directions opposite to the current mean have no logarithm and pull nowhere.

    Args:
        cosines: (T, T) float64, inner products of the unit vectors.
        weights: (T,) a_t >= 0, not all 0.
        tolerance: radians. Rounding limits the residual to about 1e-8.
        iterations: at most so many steps; 0 gives the normalised weighted mean.
    """
    shares = weights.to(cosines) / weights.sum()
    mean = _normalised(shares, cosines)
    if mean is None:
        return SphereMean(None, math.inf, 0)
    residual, done = 0.0, 0
    for step in range(iterations + 1):
        tangent = _mean_logarithm(mean, cosines, shares)
        residual = _length(tangent, cosines)
        if residual <= tolerance or step == iterations:
            break
        moved = _normalised(math.cos(residual) * mean + math.sin(residual) / residual * tangent, cosines)
        assert moved is not None  # the exponential map stays on the unit sphere
        mean, done = moved, step + 1
    return SphereMean(mean, residual, done)


def _mean_logarithm(mean: Tensor, cosines: Tensor, shares: Tensor) -> Tensor:
    """Coefficients (T,) of the weighted mean of the logarithms of all points at ``mean``."""
    dots = (cosines @ mean).clamp(-1, 1)  # (T,)
    angles = torch.arccos(dots)
    sines = torch.sin(angles)
    stretch = torch.where(angles > DEGENERATE, angles / sines.clamp_min(DEGENERATE), 1.0)  # its limit at 0 is 1
    pull = torch.where(angles > math.pi - DEGENERATE, torch.zeros_like(shares), shares * stretch)  # (T,)
    return pull - (pull * dots).sum() * mean


def _length(coefficients: Tensor, cosines: Tensor) -> float:
    return math.sqrt(max(float(coefficients @ cosines @ coefficients), 0.0))


def _normalised(coefficients: Tensor, cosines: Tensor) -> Tensor | None:
    """The coefficients over the length of the vector they stand for, None where that is nothing but rounding."""
    length = _length(coefficients, cosines)
    return coefficients / length if length > DEGENERATE else None


@dataclass(frozen=True)
class Combination:
    """The point ``sum_t c_t p_t`` as a recipe: its task vector is ``sum_t c_t tau_t + offset w0``.

    The offset is ``sum_t c_t - 1`` for points seen from 0: small changes keep their digits next to w0.
    """

    coefficients: Tensor  # (T,), float64
    offset: float

    def of(self, taus: Tensor, w0: Tensor) -> Tensor:
        """(T, *shape), (*shape) -> (*shape), for the whole tensor or a piece of it."""
        d = torch.tensordot(self.coefficients.to(taus), taus, dims=1)  # (*shape)
        return d.add_(w0, alpha=self.offset) if self.offset else d


@dataclass(frozen=True)
class Points:
    """T models' versions of one tensor as vectors from an origin: 0 (``weights``) or the base (``task_vectors``).

    ``norms`` (T,) and ``cosines`` (T, T) are float64; lengths are in units of the largest entry, or of 1. A cosine with
    a vector of length 0 is 0. ``moved``: whether any of them differs from the base.
    """

    space: Space
    norms: Tensor
    cosines: Tensor
    moved: bool

    @classmethod
    def of(cls, parts: Parts, space: Space = "task_vectors") -> Points:
        """Measure them: one pass over the entries, in float64 however they are stored."""
        products, unit, moved = torch.zeros(()), 0.0, False
        for w0, taus in parts:
            moved = moved or bool(taus.any())
            flat = taus.flatten(1) if taus.dim() > 1 else taus[:, None]  # (T, n)
            origin = w0.flatten()  # (n,)
            if not products.dim():
                products = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)  # (T, T)
            for start in range(0, flat.shape[1], CHUNK):
                part = flat[:, start : start + CHUNK].to(torch.float64, copy=True)
                if space == "weights":
                    part += origin[start : start + CHUNK]
                # Squares of what is merged in float32 fit a float64 as they are; see `inputs.LARGE`.
                largest = float(part.abs().amax()) if taus.dtype == torch.float64 else 1.0
                if largest > unit:
                    products *= (unit / largest) ** 2
                    unit = largest
                if unit not in (0.0, 1.0):
                    part /= unit
                products += part @ part.mT
        norms = products.diagonal().sqrt()  # (T,)
        return cls(space, norms, cosines_of(products), moved)

    def combination(self, coefficients: Tensor) -> Combination:
        """The point ``sum_t c_t p_t``, the base itself where all points are."""
        seen_from_zero = self.space == "weights" and self.moved
        return Combination(coefficients, float(coefficients.sum()) - 1 if seen_from_zero else 0.0)

    def at(self, mean: SphereMean, known: Tensor, weights: Tensor) -> Combination:
        """The point in the mean's direction, as long as the points are on weighted average.

        ``known`` are the indices of the points, none of length 0, whose directions the mean is of; ``weights`` (T,)
        those of all points. Without a mean: the weighted mean of the points.
        """
        shares = weights.to(self.norms) / weights.sum()
        if mean.coefficients is None:
            return Combination(shares, 0.0)
        length = (shares * self.norms).sum()
        coefficients = torch.zeros_like(self.norms)  # (T,)
        coefficients[known] = mean.coefficients * length / self.norms[known]
        return self.combination(coefficients)


def cosines_of(products: Tensor) -> Tensor:
    """Inner products (..., T, T) to cosines, with 1 on the diagonal and 0 for vectors of length 0."""
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()  # (..., T)
    inverse = torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(norms.dtype).tiny), torch.zeros_like(norms))
    cosines = (inverse[..., :, None] * products * inverse[..., None, :]).clamp(-1, 1)
    cosines.diagonal(dim1=-2, dim2=-1).copy_((norms > 0).to(cosines))
    return cosines
