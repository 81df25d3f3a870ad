"""TSV-M: keep the leading singular directions of every task and whiten them against each other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import svd
from .anchor import Context, scaled


def evidence(s: Tensor, shape: torch.Size | tuple[int, ...], largest: Tensor | None = None) -> Tensor:
    """Mask (r,) of the singular values above rounding, ``max(shape) * eps * largest``; ``largest`` defaults to s[0].

    Singular vectors of the others are arbitrary: they differ from one LAPACK to the next.
    """
    reference = s.amax() if largest is None else largest
    return s > max(shape) * torch.finfo(s.dtype).eps * reference


def whiten(vectors: Tensor) -> Tensor:
    """The polar factor ``p @ qh`` of (n, m) vectors ``p diag(s) qh``: their nearest orthonormal set.

    Where the vectors are linearly dependent that set is not unique, and the usual ``p @ qh`` fills up with arbitrary
    directions; the partial isometry that leaves them out is unique, and is what this returns.
    """
    p, s, qh = svd(vectors)
    keep = evidence(s, vectors.shape)
    return p[:, keep] @ qh[keep]


def tsv(taus: Tensor, context: Context) -> Tensor:
    """``d = U' diag(S) V'^T`` over the concatenated, whitened singular triples (arXiv 2412.00081).

    ``taus`` (T, o, i) -> (o, i). Each task keeps its ``r = max(1, floor(min(o, i) / T))`` leading triples. With more
    than min(o, i) tasks there are more columns than dimensions: whitening then makes the rows orthonormal. Directions
    of zero singular value are left out. One expert gives that expert.
    """
    rank = max(1, min(taus.shape[1:]) // len(taus))
    us, ss, vs = [], [], []
    for t, tau in enumerate(scaled(taus, context.weights)):
        u, s, vh = svd(tau, f"{context.name}, task vector {t}")
        keep = evidence(s, tau.shape)[:rank]  # (r,)
        us.append(u[:, :rank][:, keep])  # (o, r)
        ss.append(s[:rank][keep])  # (r,)
        vs.append(vh[:rank][keep].mT)  # (i, r)
    scales = torch.cat(ss)  # (T r,)
    if not len(scales):
        return torch.zeros_like(taus[0])
    left, right = whiten(torch.cat(us, 1)), whiten(torch.cat(vs, 1))  # (o, T r), (i, T r)
    return left * scales @ right.mT  # (o, i)
