"""Fisher merging: every parameter averaged by how much each task's likelihood depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..linalg import require_finite
from .anchor import Context, TaskVectors, Whole, weighted_mean

FLOOR = 1e-8
"""Smallest Fisher that counts as evidence, by default."""


def scan_fisher(stream: TaskVectors, knobs: Mapping[str, Any], whole: Whole) -> Tensor:
    """Divisors (T,) of the experts' Fishers: their L2 norms over the whole model, or ones. Reads no task vector."""
    norms = torch.ones(len(whole.fisher), dtype=torch.float64)  # (T,)
    if knobs["normalise"] == "norm":
        for t, fisher in enumerate(whole.fisher):
            norm = torch.zeros((), dtype=torch.float64)
            for name in (n for n in whole.base if n in fisher):  # tied tensors stand there once
                entries = fisher[name].detach().cpu().double()
                require_finite(f"{name}: its Fisher", entries)
                norm = torch.hypot(norm, entries.norm())  # squares of float32's largest values stay in range
            if norm > 0:
                norms[t] = norm
    return norms


def fisher(taus: Tensor, context: Context, *, normalise: str, floor: float) -> Tensor:
    """``W = sum_t a_t F_t W_t / sum_t a_t F_t``, elementwise (arXiv 2111.09832): ``taus`` (T, *shape) -> (*shape).

    F_t is the diagonal empirical Fisher of expert t. ``normalise`` "norm" divides it by its L2 norm over the whole
    model, as the paper's code does, so that a task with large gradients does not dominate; "none" takes it as it is.
    Below ``floor`` it is raised to it, after that division (the code raises before): where all are below, the result is
    the mean. Parameters without Fisher, such as running statistics, are averaged. One expert gives that expert.
    """
    if context.fisher is None:
        return weighted_mean(taus, context.weights)
    divisors = context.state.to(taus.device).view(-1, *[1] * (taus.dim() - 1))  # (T, 1, ...)
    return precision_mean(taus, context.fisher.double() / divisors, context.weights, floor)


def precision_mean(taus: Tensor, precision: Tensor, weights: Tensor, floor: float = FLOOR) -> Tensor:
    """``sum_t a_t h_t tau_t / sum_t a_t h_t`` with ``h_t = max(precision_t, floor)``, all (T, *shape) -> (*shape).

    Where every ``h_t`` is 0 it is the weighted mean. Computed in float64.
    """
    by_task = weights.double().view(-1, *[1] * (taus.dim() - 1))  # (T, 1, ...)
    raised = precision.double().clamp_min(floor)  # (T, *shape)
    largest = raised.amax(0)  # (*shape)
    shares = by_task * torch.where(largest > 0, raised / largest.where(largest > 0, torch.ones_like(largest)), 1.0)
    return ((shares / shares.sum(0)) * taus.double()).sum(0).to(taus.dtype)
