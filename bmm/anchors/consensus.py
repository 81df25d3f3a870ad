"""Consensus task arithmetic: leave out the coordinates that fewer than k tasks use, by their TALL masks."""

from __future__ import annotations

import torch
from torch import Tensor

from .anchor import Context, scaled


def tall_masks(taus: Tensor, total: Tensor, strength: float | Tensor) -> Tensor:
    """``|tau_t| >= strength |total - tau_t|``, (T, *shape) booleans: where task t's own update stands out of the merged
    one, ``total`` (*shape) (arXiv 2405.07813, equation 5).

    ``strength`` is the paper's lambda_t, one number or one a task (T,); at 0 every coordinate is kept.
    """
    if isinstance(strength, Tensor):
        strength = strength.to(taus).view(-1, *[1] * (taus.dim() - 1))  # (T, 1, ...)
    return taus.abs() >= strength * (total - taus).abs()


def merged_total(taus: Tensor, weights: Tensor) -> Tensor:
    """``tau_MTL = sum_t a_t tau_t``, (T, *shape) -> (*shape); added in float64, so that masks do not depend on the
    order of experts."""
    return scaled(taus, weights).sum(0, dtype=torch.float64).to(taus.dtype)


def consensus_ta(taus: Tensor, context: Context, *, mask_strength: float, agree: int) -> Tensor:
    """Task arithmetic over the coordinates that at least ``agree`` tasks use (arXiv 2405.07813, section 4.2).

    ``taus`` (T, *shape) -> (*shape). A task uses a coordinate where its TALL mask over the unscaled sum is set.
    ``agree`` 2 removes what nobody or one task alone uses, 1 what nobody uses, 0 nothing (task arithmetic). It never
    counts for more than the number of experts: one expert agrees with itself everywhere, so that one expert at scale 1
    gives that expert. The paper picks lambda_t for every task on validation data, from 0.2 to 0.6; here it is one knob
    for all of them. Task weights multiply the task vectors first, those the masks compare included.
    """
    kept = scaled(taus, context.weights)  # (T, *shape)
    total = merged_total(taus, context.weights)  # (*shape)
    used = tall_masks(kept, total, mask_strength).sum(0)  # (*shape)
    return torch.where(used >= min(agree, len(taus)), total, torch.zeros_like(total))
