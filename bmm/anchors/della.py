"""DELLA: drop entries at random, the smaller the likelier; rescale the rest, elect a sign, merge what agrees.

As in DARE, every tensor of every expert has its own generator, keyed by the seed, the tensor's name and a hash of the
task vector's content: a draw depends neither on the order of tensors nor on that of experts. Masks are drawn on the
CPU, so that all devices merge alike.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

from .anchor import Context, matrix_shape, named_generator
from .fuse import Fuse, fuse_all

Ranking = Literal["row", "tensor"]


def della(
    taus: Tensor, context: Context, *, drop: float, epsilon: float, ranking: Ranking, fuse: Fuse, seed: int
) -> Tensor:
    """MAGPRUNE, elect, fuse (arXiv 2406.11617): ``taus`` (T, *shape) -> (*shape).

    ``fuse`` "agree_mean" is the published merge; "sum" leaves the election out (mergekit's ``della_linear``) and wants
    a smaller scale. The mean is over what agrees and was not dropped, so that a coordinate that one task keeps gets all
    of it, divided by ``1 - p``: the more is dropped, the smaller the scale must be. One expert at drop 0 and scale 1
    gives that expert.
    """
    pruned = [magprune(tau, context.name, drop, epsilon, ranking, seed) for tau in taus]
    return fuse_all(torch.stack(pruned), context.weights, fuse)


def magprune(tau: Tensor, name: str, drop: float, epsilon: float, ranking: Ranking, seed: int) -> Tensor:
    """Zero entry i of ``tau`` (*shape) with probability p_i, divide it by ``1 - p_i`` otherwise; (*shape).

    Unbiased: the expectation over seeds is ``tau``. The draw is a uniform number an entry, dropped where below p_i.
    """
    shape = matrix_shape(tuple(tau.shape)) if ranking == "row" else None
    rows = tau.reshape(shape or (1, -1))  # (o, i), or (1, n)
    p = drop_probabilities(rows, drop, epsilon)  # (o, i)
    content = tau.detach().cpu().contiguous()
    digest = hashlib.blake2b(content.numpy().tobytes(), digest_size=16).hexdigest()
    draw = torch.rand(rows.shape, generator=named_generator("della", seed, name, digest))  # (o, i), in [0, 1)
    keep = draw.to(rows.device) >= p
    return torch.where(keep, rows / (1 - p), torch.zeros_like(rows)).reshape(tau.shape)


def drop_probabilities(rows: Tensor, drop: float, epsilon: float) -> Tensor:
    """Probabilities p (o, i) of dropping the entries of ``rows`` (o, i), linear in their rank within the row.

    The largest magnitude of a row has ``drop - epsilon / 2``, the smallest ``drop + epsilon / 2``, and the mean is
    ``drop`` exactly (the paper steps by epsilon / n, which stops one step short of the upper end). ``epsilon`` is
    narrowed to ``2 min(drop, 1 - drop)`` where the ends would leave [0, 1]. The first of equal magnitudes ranks first.
    """
    n = rows.shape[1]
    width = min(epsilon, 2 * drop, 2 * (1 - drop))
    order = rows.abs().argsort(dim=1, descending=True, stable=True)  # (o, i)
    steps = torch.linspace(0, 1, n, dtype=rows.dtype, device=rows.device) if n > 1 else rows.new_full((1,), 0.5)
    ranks = torch.empty_like(rows).scatter_(1, order, steps.expand_as(rows).contiguous())  # (o, i), 0 to 1
    return (drop - width / 2 + width * ranks).clamp(0, 1)
