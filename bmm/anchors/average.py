"""Uniform average of the experts (model soups)."""

from __future__ import annotations

from torch import Tensor

from .anchor import Context


def average(taus: Tensor, context: Context) -> Tensor:
    """``d = mean_t tau_t``, which is the mean of the experts' weights (arXiv 2203.05482).

    ``taus`` (T, *shape) -> (*shape). One expert gives that expert.
    """
    return taus.mean(0)
