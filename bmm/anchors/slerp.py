"""Merges along great circles: SLERP of two models, Multi-SLERP and the Karcher mean of any number.

All three act on each tensor by itself, flattened to one vector, and keep the vectors' mean length, which a plain
average shortens. ``space`` "weights" interpolates the weights themselves (angles seen from 0; what SLERP in the model
merging tool mergekit, arXiv 2403.13257, does), "task_vectors" the changes from the base (angles seen from the base).

Each result is a sum of the T vectors, with coefficients that depend on their inner products alone. Of a tensor that
comes in pieces those are measured in one pass, and the sum is made in a second one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from .anchor import Context, Measure, Parts
from .sphere import Combination, Points, Space, SphereMean, karcher_mean

PARALLEL = 0.9995
"""Above this |cosine| SLERP is the straight line between the two points, as published: an arc that short is one to
within 2e-4 of its length, and between opposite points there is no shortest arc."""


def slerp(taus: Tensor, context: Context, *, t: float, space: Space) -> Tensor:
    """``sin((1 - t) phi) / sin(phi) W_1 + sin(t phi) / sin(phi) W_2``, phi the angle between the two.

    The definition of Shoemake (1985), per tensor on vectors of any length, as mergekit (arXiv 2403.13257) applies it:
    ``taus`` (2, *shape) -> (*shape). t = 0 gives the first expert, 1 the second. Where they are nearly parallel or
    opposite (see `PARALLEL`), or one of them is zero, it is ``(1 - t) W_1 + t W_2``.
    """
    return _merged(measure_slerp, taus, context, {"t": t, "space": space})


def measure_slerp(parts: Parts, knobs: Mapping[str, Any], weights: Tensor) -> Combination:
    """The coefficients of one tensor's merge; see `slerp`."""
    points, t = Points.of(parts, knobs["space"]), knobs["t"]
    cosine = float(points.cosines[0, 1])
    if abs(cosine) > PARALLEL or bool((points.norms == 0).any()):
        return Combination(points.norms.new_tensor([1 - t, t]), 0.0)
    phi = math.acos(cosine)
    pair = [math.sin((1 - t) * phi) / math.sin(phi), math.sin(t * phi) / math.sin(phi)]
    return points.combination(points.norms.new_tensor(pair))


def multi_slerp(taus: Tensor, context: Context, *, space: Space, tangent: Literal["project", "log"]) -> Tensor:
    """Barycentric interpolation of directions in the tangent space at their weighted mean: (T, *shape) -> (*shape).

    The mean of the unit vectors, normalised, is the centre m; each unit vector is carried into the tangent space at m,
    averaged there with the task weights, and carried back by the exponential map; the result gets the weighted mean of
    the lengths. As in mergekit (C. Goddard, "Multi-SLERP", arXiv 2403.13257 for the tool), whose map into the tangent
    space is the orthogonal projection ("project"). Projections of the weighted points average to exactly zero at their
    own weighted mean, so that the published merge *is* m, times the mean length. The logarithm ("log") keeps the angles
    and makes it one step towards the Karcher mean.

    Zero vectors have no direction: only their length, 0, counts. Directions that cancel: the weighted mean.
    """
    return _merged(measure_multi_slerp, taus, context, {"space": space, "tangent": tangent})


def measure_multi_slerp(parts: Parts, knobs: Mapping[str, Any], weights: Tensor) -> Combination:
    """The coefficients of one tensor's merge; see `multi_slerp`."""
    return _mean(Points.of(parts, knobs["space"]), weights, 0.0, 1 if knobs["tangent"] == "log" else 0)


def karcher(taus: Tensor, context: Context, *, space: Space, tolerance: float, iterations: int) -> Tensor:
    """The Karcher mean of the directions, times the weighted mean of the lengths: (T, *shape) -> (*shape).

    The point of the sphere with the least weighted sum of squared angles to all experts (H. Karcher 1977), found by
    `sphere.karcher_mean`, which reports residual and steps; as merge method from mergekit (arXiv 2403.13257). Two
    experts of equal weight and length give SLERP at t = 1/2. Zero vectors and cancelling directions as in
    `multi_slerp`.
    """
    knobs = {"space": space, "tolerance": tolerance, "iterations": iterations}
    return _merged(measure_karcher, taus, context, knobs)


def measure_karcher(parts: Parts, knobs: Mapping[str, Any], weights: Tensor) -> Combination:
    """The coefficients of one tensor's merge; see `karcher`."""
    return _mean(Points.of(parts, knobs["space"]), weights, knobs["tolerance"], knobs["iterations"])


def _mean(points: Points, weights: Tensor, tolerance: float, iterations: int) -> Combination:
    known = points.norms.nonzero()[:, 0]  # the points that have a direction
    if not len(known):
        return points.at(SphereMean(None, math.inf, 0), known, weights)
    found = karcher_mean(points.cosines[known][:, known], weights.to(known.device)[known], tolerance, iterations)
    return points.at(found, known, weights)


def _merged(measure: Measure, taus: Tensor, context: Context, knobs: Mapping[str, Any]) -> Tensor:
    """The task vector (*shape) of a piece of a tensor that was measured before, or of a whole one."""
    found: Combination = context.state or measure([(context.w0, taus)], knobs, context.weights)
    return found.of(taus, context.w0)
