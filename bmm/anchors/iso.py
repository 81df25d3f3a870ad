"""Isotropic merging: Iso-C flattens the spectrum of the summed task vectors, Iso-CTS adds task-specific directions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import svd
from .anchor import Context, scaled
from .tsv import evidence, whiten


def iso_c(taus: Tensor, context: Context) -> Tensor:
    """``d = mean(s) U V^T`` with ``U diag(s) V^T = sum_t tau_t`` (arXiv 2502.04959): ``taus`` (T, o, i) -> (o, i).

    A sum of full rank is treated as published. In a sum of lower rank (LoRA experts) the remaining singular vectors are
    arbitrary: they are left out, of ``d`` and of the mean, which keeps the nuclear norm of the sum.
    """
    taus = scaled(taus, context.weights)
    u, s, vh = svd(taus.sum(0), context.name)  # (o, r), (r,), (r, i)
    keep = evidence(s, taus.shape[1:], _norms(taus).sum())
    if not keep.any():
        return torch.zeros_like(taus[0])
    return s[keep].mean() * (u[:, keep] @ vh[keep])  # (o, i)


def iso_cts(taus: Tensor, context: Context, *, common_share: float) -> Tensor:
    """Common directions of the sum plus, for each task, directions of its own off them (arXiv 2502.04959).

    ``taus`` (T, o, i) -> (o, i). Of the ``m = min(o, i)`` slots every task gets
    ``round((1 - common_share) m / T)``, at most ``floor(m / T)``; the leading directions of the sum take the others. A
    task's own directions are the leading ones of ``(I - U_c U_c^T) tau_t``. All of them are whitened together and share
    one scale, the mean of the collected singular values. Directions of zero singular value are left out, as in `iso_c`.
    With no slots for the tasks, and with one expert, this is `iso_c`.
    """
    taus = scaled(taus, context.weights)
    slots = min(taus.shape[1:])
    own = min(round((1 - common_share) * slots / len(taus)), slots // len(taus))
    common = slots - own * len(taus)
    norms = _norms(taus)  # (T,)

    u, s, vh = svd(taus.sum(0), context.name)
    keep = evidence(s, taus.shape[1:], norms.sum())[:common]
    shared = u[:, :common][:, keep]  # (o, c)
    us, ss, vs = [shared], [s[:common][keep]], [vh[:common][keep].mT]
    for t, tau in enumerate(taus if own else ()):
        rest = tau - shared @ (shared.mT @ tau)  # (o, i)
        u, s, vh = svd(rest, f"{context.name}, task vector {t}")
        keep = evidence(s, tau.shape, norms[t])[:own]  # what projecting leaves of nothing is rounding, not direction
        us.append(u[:, :own][:, keep])  # (o, own)
        ss.append(s[:own][keep])  # (own,)
        vs.append(vh[:own][keep].mT)  # (i, own)
    scales = torch.cat(ss)
    if not len(scales):
        return torch.zeros_like(taus[0])
    return scales.mean() * (whiten(torch.cat(us, 1)) @ whiten(torch.cat(vs, 1)).mT)  # (o, i)


def _norms(taus: Tensor) -> Tensor:
    """Frobenius norm of each task vector, (T,): the size against which rounding errors are measured."""
    return torch.linalg.vector_norm(taus.flatten(1), dim=1)
