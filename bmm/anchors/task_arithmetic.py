"""Task arithmetic: the sum of the task vectors."""

from __future__ import annotations

from torch import Tensor

from .anchor import Context


def task_arithmetic(taus: Tensor, context: Context) -> Tensor:
    """``d = sum_t tau_t`` (arXiv 2212.04089); the coefficient in front is the linear knob ``scale``.

    ``taus`` (T, *shape) -> (*shape). One expert at scale 1 gives that expert.
    """
    return taus.sum(0)
