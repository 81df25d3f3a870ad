"""Uncertainty-based gradient matching: task arithmetic whose steps are corrected by the curvature of base and tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from .anchor import Context


def gradient_matching(taus: Tensor, context: Context, *, coefficient: float, prior: float) -> Tensor:
    """``d = Hbar^-1 sum_t c a_t (H_0 + H_t) tau_t``, ``Hbar = H_0 + sum_t c a_t H_t``, elementwise (arXiv 2310.12808):
    ``taus`` (T, *shape) -> (*shape).

    H_t is the diagonal Fisher of expert t, H_0 that of the base plus ``prior``; c is ``coefficient``, the paper's
    alpha. It cancels the first-order mismatch between the gradients of the merged model and of the experts, where each
    expert minimises its loss plus ``1/2 |theta - theta_0|^2`` in H_0 and the merged model minimises ``c a_t`` times the
    losses plus one such term. A large ``prior`` leaves task arithmetic at scale c; H_0 = 0 leaves Fisher merging.

    The paper sums squared gradients over its data, here they are means: ``prior`` is in units of a mean. Where all
    curvature is 0 the limit of a vanishing prior is taken, task arithmetic. One expert at ``coefficient`` 1 gives that
    expert.
    """
    assert context.fisher is not None
    assert context.base_fisher is not None
    steps = coefficient * context.weights.double().view(-1, *[1] * (taus.dim() - 1))  # (T, 1, ...)
    h0 = context.base_fisher.double() + prior  # (*shape)
    ht = context.fisher.double()  # (T, *shape)
    total = h0 + (steps * ht).sum(0)  # (*shape)
    ratio = torch.where(total > 0, (h0 + ht) / total.where(total > 0, torch.ones_like(total)), 1.0)  # (T, *shape)
    return (steps * ratio * taus.double()).sum(0).to(taus.dtype)
