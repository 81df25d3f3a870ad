"""TSV-M: keep the leading singular directions of every task and whiten them against each other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import leading_triples, polar, rounding
from .anchor import Context


def whiten(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """The polar factor ``p @ qh`` of (n, m) vectors ``p diag(s) qh``: their nearest orthonormal set, in float64.

    ``dtype`` is that of the matrices the vectors come from: dependence below its precision is dependence. Where the
    vectors are linearly dependent that set is not unique, and the usual ``p @ qh`` fills up with arbitrary directions;
    the partial isometry that leaves them out is unique, and is what this returns. It comes from the Gram of the
    vectors, ``vectors (vectors' vectors)^(-1/2)``, see `bmm.linalg.polar`.
    """
    return polar(vectors, rounding(vectors, dtype), "singular vectors of all tasks")[0]


def tsv(taus: Tensor, context: Context) -> Tensor:
    """``d = U' diag(S) V'^T`` over the concatenated, whitened singular triples (arXiv 2412.00081).

    ``taus`` (T, o, i) -> (o, i). Each task keeps its ``r = max(1, floor(min(o, i) / T))`` leading triples. With more
    than min(o, i) tasks there are more columns than dimensions: whitening then makes the rows orthonormal. Directions
    of zero singular value are left out. One expert gives that expert.

    In float64, one expert at a time; besides ``taus`` it holds about four matrices (o, i) of that width, however many
    experts there are.
    """
    rank = max(1, min(taus.shape[1:]) // len(taus))
    us, ss, vs = [], [], []
    for t, (tau, weight) in enumerate(zip(taus, context.weights.tolist(), strict=True)):
        u, s, v = leading_triples(tau, rank, rounding(tau, tau.dtype), f"{context.name}, task vector {t}")
        us.append(u if weight > 0 else -u)  # (o, r)
        ss.append(abs(weight) * s)  # (r,)
        vs.append(v)  # (i, r)
    scales = torch.cat(ss)  # (T r,)
    if not len(scales):
        return torch.zeros_like(taus[0])
    left = whiten(torch.cat(us, 1), taus.dtype) * scales  # (o, T r)
    stacked = torch.cat(vs, 1)  # (i, T r)
    del vs
    return (left @ whiten(stacked, taus.dtype).mT).to(taus.dtype)  # (o, i)
