"""MagMax: of every coordinate, the entry of largest magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

from .anchor import Context, scaled


def magmax(taus: Tensor, context: Context) -> Tensor:
    """``d = tau_m`` with ``m = argmax_t |a_t tau_t|``, coordinate by coordinate (arXiv 2407.06322).

    ``taus`` (T, *shape) -> (*shape). Opposite entries of the same largest magnitude cancel, so that the order of the
    experts decides nothing. Task weights multiply the task vectors first. One expert at scale 1 gives that expert.
    """
    kept = scaled(taus, context.weights)  # (T, *shape)
    highest, lowest = kept.amax(0), kept.amin(0)  # (*shape)
    d = torch.where(highest > -lowest, highest, lowest)
    return torch.where(highest == -lowest, torch.zeros_like(d), d)
