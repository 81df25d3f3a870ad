"""Isotropic merging: Iso-C flattens the spectrum of the summed task vectors, Iso-CTS adds task-specific directions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import leading_triples, polar, rounding
from .anchor import Context, weighted_sum
from .tsv import Bundle


def iso_c(taus: Tensor, context: Context) -> Tensor:
    """``d = mean(s) U V^T`` with ``U diag(s) V^T = sum_t tau_t`` (arXiv 2502.04959): ``taus`` (T, o, i) -> (o, i).

    A sum of full rank is treated as published. In a sum of lower rank (LoRA experts) the remaining singular vectors are
    arbitrary: they are left out, of ``d`` and of the mean, which keeps the nuclear norm of the sum.
    """
    total = weighted_sum(taus, context.weights)  # (o, i)
    noise = rounding(total, total.dtype, float(_norms(taus, context.weights).sum()))
    isometry, s = polar(total, noise, context.name)  # (o, i), (r,)
    if not len(s):
        return torch.zeros_like(total)
    return isometry.mul_(s.mean()).to(taus.dtype)


def iso_cts(taus: Tensor, context: Context, *, common_share: float) -> Tensor:
    """Common directions of the sum plus, for each task, directions of its own off them (arXiv 2502.04959).

    ``taus`` (T, o, i) -> (o, i). Of the ``m = min(o, i)`` slots every task gets
    ``round((1 - common_share) m / T)``, at most ``floor(m / T)``; the leading directions of the sum take the others. A
    task's own directions are the leading ones of ``(I - U_c U_c^T) tau_t``. All of them are whitened together and share
    one scale, the mean of the collected singular values. Directions of zero singular value are left out, as in `iso_c`.
    With no slots for the tasks, and with one expert, this is `iso_c`.
    """
    slots = min(taus.shape[1:])
    own = min(round((1 - common_share) * slots / len(taus)), slots // len(taus))
    norms = _norms(taus, context.weights)  # (T,)

    total = weighted_sum(taus, context.weights)  # (o, i)
    noise = rounding(total, total.dtype, float(norms.sum()))
    bundle = Bundle(taus, slots)
    bundle.add(*leading_triples(total, slots - own * len(taus), noise, context.name))
    shared = bundle.left  # (o, c)
    del total
    for t in range(len(taus) if own else 0):
        rest = taus[t].to(torch.float64, copy=True).mul_(context.weights[t])  # (o, i)
        for part in rest.split(512, dim=1):  # (o, 512), to need no second matrix of that size
            part.addmm_(shared, shared.mT @ part, alpha=-1)
        # what projecting leaves of nothing is rounding, not direction: it is measured against the task vector
        noise = rounding(rest, taus.dtype, float(norms[t]))
        bundle.add(*leading_triples(rest, own, noise, f"{context.name}, task vector {t}"))
    return bundle.merged(bundle.scales.mean())


def _norms(taus: Tensor, weights: Tensor) -> Tensor:
    """Frobenius norm of each weighted task vector, (T,): the size against which rounding errors are measured."""
    return torch.linalg.vector_norm(taus.flatten(1), dim=1) * weights.abs().to(taus)
