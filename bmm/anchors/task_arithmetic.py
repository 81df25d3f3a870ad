"""Task arithmetic: the sum of the task vectors."""

from __future__ import annotations

from torch import Tensor

from .anchor import Context, weighted_sum


def task_arithmetic(taus: Tensor, context: Context) -> Tensor:
    """``d = sum_t a_t tau_t`` (arXiv 2212.04089); the coefficient in front is the linear knob ``scale``.

    A negative weight forgets its task (negation); `b - a + c` over three experts is an analogy.

    ``taus`` (T, *shape) -> (*shape). One expert at scale 1 gives that expert.
    """
    return weighted_sum(taus, context.weights)
