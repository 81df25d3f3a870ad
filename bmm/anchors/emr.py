"""EMR: elect one unified task vector; masks and rescalers turn it back into every task's own (see `masked`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .anchor import Context, scaled
from .ties import elect


def emr(taus: Tensor, context: Context) -> Tensor:
    """The unified task vector (arXiv 2405.17461, equations 1 and 2): ``taus`` (T, *shape) -> (*shape).

    Of every coordinate the sign of the sum over tasks, with the largest magnitude among the entries of that sign; 0
    where they cancel exactly (the released code takes the negative sign there). Task weights multiply the task vectors
    first. One expert at scale 1 gives that expert. By itself this is a plain merge; the paper's method adds a mask and
    a scale for every task, see `bmm.anchors.emr_compress`.
    """
    return unify(taus, context.weights)


def unify(taus: Tensor, weights: Tensor) -> Tensor:
    """Elected sign times largest magnitude that agrees with it, (T, *shape) -> (*shape)."""
    kept = scaled(taus, weights)  # (T, *shape)
    elected = elect(kept)  # (*shape)
    largest = torch.where(elected > 0, kept.amax(0), kept.amin(0))  # a positive sum has a positive entry, and so on
    return torch.where(elected == 0, torch.zeros_like(largest), largest)


def agreement_masks(taus: Tensor, unified: Tensor) -> Tensor:
    """``tau_t * tau_uni > 0``, (T, *shape) booleans (equation 3); by signs, as products of tiny entries vanish."""
    return (taus.sign() == unified.sign()) & (unified != 0)
