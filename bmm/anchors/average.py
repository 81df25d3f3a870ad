"""Average of the experts (model soups)."""

from __future__ import annotations

from torch import Tensor

from .anchor import Context, weighted_mean


def average(taus: Tensor, context: Context) -> Tensor:
    """``d = sum_t a_t tau_t / sum_t a_t``: the (weighted) mean of the experts' weights (arXiv 2203.05482).

    ``taus`` (T, *shape) -> (*shape). One expert gives that expert.
    """
    return weighted_mean(taus, context.weights)
