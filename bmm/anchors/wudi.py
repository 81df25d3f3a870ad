"""WUDI: the merged task vector that interferes least with the tasks' own row spaces.

    objective(d) = sum_t a_t || (d - tau_t) tau_t^T ||_F^2 / || tau_t ||_F^2
    gradient(d)  = 2 (d A - B),   A = sum_t G_t,  B = sum_t tau_t G_t,  G_t = a_t tau_t^T tau_t / || tau_t ||_F^2

It is a linear least-squares problem. `wudi` takes the published 300 steps of Adam towards its minimum, `wudi_exact`
solves it. A zero task vector has no row space and leaves no term.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..linalg import eigh_psd
from .anchor import Context, weighted_mean, weighted_sum

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's defaults, which the paper uses


def normal_equations(taus: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """A (i, i) and B (o, i) of the objective's gradient, for ``taus`` (T, o, i) and ``weights`` (T,)."""
    a, b = taus.new_zeros(taus.shape[2], taus.shape[2]), torch.zeros_like(taus[0])
    for tau, weight in zip(taus, weights.tolist(), strict=True):
        norm = torch.linalg.vector_norm(tau)
        if norm > 0:
            unit = tau / norm  # squares of the entries themselves may leave the range of float32
            gram = unit.mT @ unit  # (i, i)
            a.add_(gram, alpha=weight)
            b.addmm_(tau, gram, alpha=weight)
    return a, b


def objective(d: Tensor, taus: Tensor) -> float:
    """The interference of ``d`` (o, i) with ``taus`` (T, o, i), in float64."""
    d, taus = d.double(), taus.double()
    norms = torch.linalg.vector_norm(taus.flatten(1), dim=1)  # (T,)
    residual = (d - taus) @ taus.mT  # (T, o, o)
    return float((residual.square().sum((1, 2))[norms > 0] / norms[norms > 0].square()).sum())


def wudi(taus: Tensor, context: Context, *, steps: int, rate: float) -> Tensor:
    """Adam on the objective from ``sum_t tau_t``, as published (arXiv 2503.08099): ``taus`` (T, o, i) -> (o, i).

    ``rate`` is absolute: an entry moves by about ``steps * rate`` at most, whatever the size of the task vectors.
    One expert is a minimum already, and is kept.
    """
    a, b = normal_equations(taus, context.weights)
    d = weighted_sum(taus, context.weights)  # (o, i)
    mean, square = torch.zeros_like(d), torch.zeros_like(d)
    for step in range(1, steps + 1):
        gradient = 2 * (d @ a - b)  # (o, i)
        mean.mul_(BETA1).add_(gradient, alpha=1 - BETA1)
        square.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        spread = (square / (1 - BETA2**step)).sqrt_().add_(EPSILON)
        d.addcdiv_(mean, spread, value=-rate / (1 - BETA1**step))
    return d


def wudi_exact(taus: Tensor, context: Context, *, ridge: float, towards: Literal["mean", "sum"]) -> Tensor:
    """The minimum itself (objective of arXiv 2503.08099): ``taus`` (T, o, i) -> (o, i).

    Minimises ``objective(d) + mu ||d - z||_F^2`` with z the mean or the sum of the task vectors and
    ``mu = ridge * largest eigenvalue of A``:

        d = z + (B - z A) (A + mu I)^-1

    A small ridge keeps the minimum from overfitting the task vectors: of 1e-6 to 1, 1e-2 was best on validation data.

    In float64 through the eigenvectors of A; with ridge 0 the inverse is the pseudo-inverse, and d the minimiser
    nearest to z. What no task vector reaches stays at z, which is zero there. One expert gives that expert.
    """
    wide = taus.double()
    a, b = normal_equations(wide, context.weights)
    z = (weighted_mean if towards == "mean" else weighted_sum)(wide, context.weights)
    e, u = eigh_psd(a, f"{context.name}, pooled Gram of the task vectors")  # (i,), (i, i)
    mu = ridge * e[-1]
    seen = e > len(e) * torch.finfo(e.dtype).eps * e[-1]
    gain = torch.where(seen, 1 / (e + mu).where(seen, torch.ones_like(e)), torch.zeros_like(e))  # (i,)
    return (z + ((b - z @ a) @ u * gain) @ u.mT).to(taus.dtype)
