"""Task vectors thinned out each by a rule of its own, then summed: what mergekit makes of the methods built on task
arithmetic (arXiv 2403.13257), of which the registry has the published forms.

It differs from those in that every rule has its own density for every expert and acts on one tensor; that what is left
may be rescaled to the l1 norm it had (where DARE and DELLA divide by the probability of keeping an entry); that
coordinates whose sum is exactly 0 count as positive; and that the mean divides by the sum of the signed task weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .anchor import Context, matrix_shape, named_generator
from .della import drop_probabilities

NO_DIVISOR = 1e-8
"""Sums of task weights smaller than this in magnitude divide nothing."""


@dataclass(frozen=True)
class Thinning:
    """What stays of one task vector.

    ``rule``: "largest" keeps the ``density n`` largest entries (TIES); "middle" too, after the ``gamma n`` largest have
    been dropped (Breadcrumbs); "random" keeps each with probability ``density`` (DARE); "ranked" with one that rises
    with the rank of the magnitude in its row, from ``density - epsilon`` to ``density + epsilon`` (DELLA). At a density
    of 1 or more everything stays. ``rescale``: what stays gets the l1 norm of the whole.
    """

    rule: Literal["largest", "middle", "random", "ranked"] = "largest"
    density: float = 1.0
    gamma: float = 0.0
    epsilon: float = 0.0
    rescale: bool = False

    @property
    def whole(self) -> bool:
        """Whether everything stays."""
        return self.density >= 1

    def apply(self, tau: Tensor, name: str, seed: int) -> Tensor:
        """``tau`` (*shape), thinned out; (*shape). Draws are keyed by the seed, the name and the content, as DARE's."""
        if self.whole:
            return tau
        if self.rule in ("largest", "middle"):
            keep = self._between(tau.reshape(-1).abs()).view(tau.shape)
        else:
            keep = self._drawn(tau, name, seed)
        kept = torch.where(keep, tau, torch.zeros_like(tau))
        if self.rescale:
            left = float(kept.abs().sum(dtype=torch.float64))
            kept *= float(tau.abs().sum(dtype=torch.float64)) / left if left else 1.0
        return kept

    def _between(self, sizes: Tensor) -> Tensor:
        """Which of the magnitudes (n,) stay, (n,) booleans; entries equal to a cut all stay."""
        n = len(sizes)
        count = int(self.density * n)
        top = min(int(self.gamma * n), n - count) if self.rule == "middle" else 0
        if self.rule == "largest" and self.density > 0:
            count = max(1, count)
        if not count:
            return torch.zeros_like(sizes, dtype=torch.bool)
        keep = sizes >= sizes.kthvalue(n - top - count + 1).values
        return keep & (sizes <= sizes.kthvalue(n - top).values) if top else keep

    def _drawn(self, tau: Tensor, name: str, seed: int) -> Tensor:
        content = tau.detach().cpu().contiguous()
        digest = hashlib.blake2b(content.numpy().tobytes(), digest_size=16).hexdigest()
        draw = torch.rand(tau.shape, generator=named_generator("thinned", seed, name, digest))  # (*shape), in [0, 1)
        draw = draw.to(tau.device)
        if self.rule == "random":
            return draw < self.density
        rows = tau.reshape(matrix_shape(tuple(tau.shape)) or (1, -1))  # (o, i), or (1, n)
        return draw >= drop_probabilities(rows, 1 - self.density, 2 * self.epsilon).view(tau.shape)


def thinned(
    taus: Tensor, context: Context, *, rules: Sequence[Thinning], elect: bool, mean: bool, seed: int = 0
) -> Tensor:
    """``sum_t a_t thin_t(tau_t)``, (T, *shape) -> (*shape).

    ``elect``: only entries with the sign of that sum count; ``mean``: divide by the sum of the task weights (of those
    that count, where there is an election).
    """
    along = [1] * (taus.dim() - 1)
    weights = context.weights.to(taus).view(-1, *along)  # (T, 1, ...)
    kept = taus * weights
    for row, tau, weight, rule in zip(kept, taus, weights, rules, strict=True):
        if not rule.whole:
            torch.mul(rule.apply(tau, context.name, seed), weight, out=row)
    if elect:
        sign = torch.where(kept.sum(0, dtype=torch.float64) >= 0, 1.0, -1.0).to(kept)  # (*shape)
        counts = kept * sign > 0  # (T, *shape)
        kept *= counts
    total = kept.sum(0)  # (*shape)
    if mean:
        divisor = (counts * weights).sum(0) if elect else weights.sum(0)  # (*shape) or (1, ...)
        total /= torch.where(divisor.abs() < NO_DIVISOR, torch.ones_like(divisor), divisor)
    return total
