"""MaTS: merging as a linear system between task parameter subspaces, solved by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .anchor import Context, weighted_mean, weighted_sum
from .fisher import precision_mean
from .regmean import scale_off_diagonal


@dataclass(frozen=True)
class Solution:
    """What `solve` found and what it cost; ``residuals[k]`` is ``|target - A x_k| / |target|`` after k iterations."""

    value: Tensor
    iterations: int
    residuals: tuple[float, ...]


def solve(
    product: Callable[[Tensor], Tensor], target: Tensor, start: Tensor, *, iterations: int, tolerance: float
) -> Solution:
    """Conjugate gradients on ``A x = target`` from ``start``, at most ``iterations`` of them, in ``target``'s dtype.

    ``product(x)`` is ``A x`` for a symmetric positive semi-definite A; ``x``, ``target`` and ``start`` share any one
    shape and are one long vector. Stops as soon as the relative residual is at most ``tolerance`` (at once, if
    ``start`` is a solution), or where rounding leaves no direction of positive curvature. The error falls with every
    iteration in the norm of A; the residual need not. What A does not see stays as in ``start``.
    """
    x = start.clone()
    residual = target - product(x)
    reference = float(target.norm()) or float(residual.norm()) or 1.0
    energy = float(residual.norm() / reference) ** 2
    direction, history = residual / reference, [energy**0.5]
    residual = direction  # from here on in units of the reference: its squares are in range, whatever the weights'
    while len(history) <= iterations and history[-1] > tolerance:
        image = product(direction)
        curvature = float((direction * image).sum())
        if not curvature > 0:
            break
        step = energy / curvature
        x = x + (step * reference) * direction
        residual = residual - step * image
        before, energy = energy, float(residual.square().sum())
        direction = residual + (energy / before) * direction
        history.append(energy**0.5)
    return Solution(x, len(history) - 1, tuple(history))


def mats(
    taus: Tensor, context: Context, *, start: str, iterations: int, tolerance: float, off_diagonal: float
) -> Tensor:
    """``W`` with ``sum_t a_t W C_t = sum_t a_t W_t C_t`` (arXiv 2312.04339): ``taus`` (T, o, i) -> (o, i).

    C_t is the Gram of the inputs of expert t's weight, the system that RegMean inverts; stopped early, conjugate
    gradients stay close to ``start``, the mean or sum of the task vectors or the base. ``off_diagonal`` scales the
    other entries of the Grams, as in RegMean; 1 is the paper's. Grams carry noise of their storage's precision: no
    smaller ``tolerance`` is asked for. In float64. Weights without Gram: `without_gram`. One expert gives that expert.
    """
    if context.grams is None:
        return without_gram(taus, context)
    wide = taus.double()  # (T, o, i)
    pooled = wide.new_zeros(wide.shape[2], wide.shape[2])  # (i, i)
    target = torch.zeros_like(wide[0])  # (o, i)
    for tau, raw, weight in zip(wide, context.grams, context.weights.tolist(), strict=True):
        gram = weight * scale_off_diagonal(raw.double(), off_diagonal)  # (i, i)
        pooled += gram
        target += tau @ gram
    first = {
        "mean": lambda: weighted_mean(wide, context.weights),
        "sum": lambda: weighted_sum(wide, context.weights),
        "base": lambda: torch.zeros_like(target),
    }[start]()  # (o, i)
    precision = max(torch.finfo(raw.dtype).eps for raw in context.grams)
    found = solve(lambda x: x @ pooled, target, first, iterations=iterations, tolerance=max(tolerance, precision))
    return found.value.to(taus.dtype)


def without_gram(taus: Tensor, context: Context) -> Tensor:
    """What has no Gram: averaged by the diagonal Fishers where they are given, else the mean (as the paper's code)."""
    if context.fisher is None:
        return weighted_mean(taus, context.weights)
    return precision_mean(taus, context.fisher, context.weights)
