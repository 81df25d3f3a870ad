"""Model Breadcrumbs: cut both tails of every task vector, the negligible entries and the outliers, then sum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import MergeError
from .anchor import Context
from .fuse import Fuse, fuse_all


def breadcrumbs(taus: Tensor, context: Context, *, beta: float, gamma: float, fuse: Fuse) -> Tensor:
    """Mask both tails by magnitude, then sum (arXiv 2312.06795): ``taus`` (T, *shape) -> (*shape).

    As published, tensor by tensor: of n entries in order of magnitude, those of rank ``beta n`` to ``gamma n`` stay.
    Both names and meanings are the paper's; mergekit's "gamma" is ``1 - gamma`` here and its "density" is
    ``gamma - beta``. Ranks are rounded so that no tensor is emptied, and entries equal to a cut all stay: no order
    decides between them. ``fuse`` "sum" is the published merge; the others elect a sign first, as mergekit's
    ``breadcrumbs_ties`` does. One expert at beta 0, gamma 1 and scale 1 gives that expert.

    Raises `MergeError` where ``beta >= gamma``, which would leave nothing.
    """
    if beta >= gamma:
        raise MergeError(f"beta = {beta:g} and gamma = {gamma:g} leave no entry", "choose beta below gamma")
    return fuse_all(crumbs(taus, beta, gamma), context.weights, fuse)


def crumbs(taus: Tensor, beta: float, gamma: float) -> Tensor:
    """``taus`` (T, *shape) with zeros outside the magnitudes of rank ``beta n`` to ``gamma n`` of each task."""
    sizes = taus.reshape(len(taus), -1).abs()  # (T, n)
    n = sizes.shape[1]
    lowest = math.floor(beta * n + 1e-6)  # 0.85 * 100 must be 85, whatever its last bit
    highest = math.ceil(gamma * n - 1e-6) - 1
    keep = torch.ones_like(sizes, dtype=torch.bool)  # (T, n)
    if lowest > 0:
        keep &= sizes >= sizes.kthvalue(lowest + 1, dim=1, keepdim=True).values
    if highest < n - 1:
        keep &= sizes <= sizes.kthvalue(highest + 1, dim=1, keepdim=True).values
    return torch.where(keep.view_as(taus), taus, torch.zeros_like(taus))
