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
    vectors, ``vectors (vectors' vectors)^(-1/2)``, see `bmm.linalg.polar`. Vectors in float64 are overwritten.
    """
    return polar(vectors, rounding(vectors, dtype), "singular vectors of all tasks", overwrite=True)[0]


def tsv(taus: Tensor, context: Context) -> Tensor:
    """``d = U' diag(S) V'^T`` over the concatenated, whitened singular triples (arXiv 2412.00081).

    ``taus`` (T, o, i) -> (o, i). Each task keeps its ``r = max(1, floor(min(o, i) / T))`` leading triples. With more
    than min(o, i) tasks there are more columns than dimensions: whitening then makes the rows orthonormal. Directions
    of zero singular value are left out. One expert gives that expert.

    In float64, one expert at a time; besides ``taus`` it holds about four matrices (o, i) of that width, however many
    experts there are.
    """
    rank = max(1, min(taus.shape[1:]) // len(taus))
    bundle = Bundle(taus, rank * len(taus))
    for t, (tau, weight) in enumerate(zip(taus, context.weights.tolist(), strict=True)):
        u, s, v = leading_triples(tau, rank, rounding(tau, tau.dtype), f"{context.name}, task vector {t}")
        bundle.add(u if weight > 0 else -u, abs(weight) * s, v)
    return bundle.merged(bundle.scales)


class Bundle:
    """Singular triples of several matrices (o, i) side by side, in memory allotted once for ``most`` of them."""

    def __init__(self, taus: Tensor, most: int) -> None:
        self._like = taus[0]
        self._left = taus.new_empty(taus.shape[1], most, dtype=torch.float64)  # (o, most)
        self._right = taus.new_empty(taus.shape[2], most, dtype=torch.float64)  # (i, most)
        self._scales = taus.new_empty(most, dtype=torch.float64)
        self._count = 0

    def add(self, u: Tensor, s: Tensor, v: Tensor) -> None:
        """Take in u (o, k), s (k,) and v (i, k)."""
        place = slice(self._count, self._count + len(s))
        self._left[:, place], self._scales[place], self._right[:, place] = u, s, v
        self._count = place.stop

    @property
    def left(self) -> Tensor:
        """The left singular vectors, (o, k)."""
        return self._left[:, : self._count]

    @property
    def scales(self) -> Tensor:
        """The singular values, (k,)."""
        return self._scales[: self._count]

    def merged(self, scales: Tensor) -> Tensor:
        """``whiten(u) diag(scales) whiten(v)'`` (o, i), ``scales`` (k,) or (), in the task vectors' dtype; once."""
        if not self._count:
            return torch.zeros_like(self._like)
        dtype = self._like.dtype
        left = whiten(self.left, dtype).mul_(scales)  # (o, k)
        return (left @ whiten(self._right[:, : self._count], dtype).mT).to(dtype)  # (o, i)
