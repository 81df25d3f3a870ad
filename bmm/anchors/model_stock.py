"""Model Stock: how far to go from the base to the experts' mean, read from the angle between their task vectors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .anchor import Context
from .sphere import CHUNK, Points, cosines_of


def model_stock(taus: Tensor, context: Context, *, per: Literal["tensor", "row"], beyond: bool = False) -> Tensor:
    """``d = t mean_t(tau_t)`` with ``t = T cos / (1 + (T - 1) cos)`` (arXiv 2403.19522): (T, *shape) -> (*shape).

    ``cos`` is the mean cosine over all pairs of task vectors of the tensor (the paper has one angle; for more than two
    experts mergekit takes this mean too). It is the point of the experts' plane next to the base when the experts
    stand around their centre symmetrically: t falls from 1 (identical experts) to 0 (orthogonal ones). The paper has
    no case for cos < 0; here t stays at 0, since beyond it the formula turns away from the experts. One expert gives
    that expert. A zero task vector has cosine 0 with the others.

    ``per`` "row" measures an angle for each output (the first dimension; a tensor of less than two is one row) in place
    of the tensor's. ``beyond`` follows the formula past the base where cos < 0, as mergekit does.
    """
    lowest = -1.0 if beyond else 0.0
    if per == "tensor" or taus.dim() < 3:
        share = _share(Points.of([(context.w0, taus)]).cosines, lowest)  # ()
    else:
        rows = taus.flatten(2).transpose(0, 1)  # (o, T, n)
        share = torch.cat([_share(_cosines(part), lowest) for part in rows.split(_rows_at_once(rows))])  # (o,)
        share = share.view(-1, *[1] * (taus.dim() - 2))
    return share.to(taus) * taus.mean(0)


def _rows_at_once(rows: Tensor) -> int:
    return max(1, CHUNK // max(1, rows[0].numel()))


def _cosines(rows: Tensor) -> Tensor:
    """Cosines (r, T, T) between the tasks in each of the rows (r, T, n)."""
    wide = rows.double()
    wide = wide / wide.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return cosines_of(wide @ wide.mT)


def _share(cosines: Tensor, lowest: float) -> Tensor:
    """The interpolation ratio t (...) of cosines (..., T, T), whose mean counts as no less than ``lowest``."""
    count = cosines.shape[-1]
    if count == 1:
        return torch.ones_like(cosines[..., 0, 0])
    pairs = cosines.sum((-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)  # (...), each pair twice
    cos = (pairs / (count * (count - 1))).clamp(lowest, 1)
    return count * cos / (1 + (count - 1) * cos)
