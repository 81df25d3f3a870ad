"""How task vectors that were thinned out join into one: a sum, or what agrees with an elected sign."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .anchor import scaled, weighted_sum
from .ties import elect, join_agreeing

Fuse = Literal["sum", "agree_sum", "agree_mean"]


def fuse_all(taus: Tensor, weights: Tensor, how: Fuse) -> Tensor:
    """Join ``taus`` (T, *shape) -> (*shape), each multiplied by its task weight first.

    "sum": all entries. "agree_sum" and "agree_mean": only those with the sign of their sum, which is elected tensor by
    tensor; the mean divides by the sum of ``|a_t|`` over the entries that agree, zeros not counted. Coordinates whose
    entries cancel exactly stay at the base: there is no majority sign of the model here, as TIES has.
    """
    if how == "sum":
        return weighted_sum(taus, weights)
    kept = scaled(taus, weights)  # (T, *shape)
    return join_agreeing(kept, elect(kept), weights, how == "agree_mean")
