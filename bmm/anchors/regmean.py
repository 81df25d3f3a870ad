"""RegMean: the linear map that best reproduces every expert's outputs on that expert's own inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import eigh_psd
from .anchor import Context, weighted_mean


def scale_off_diagonal(gram: Tensor, factor: float) -> Tensor:
    """The Gram (i, i) with all entries but its diagonal multiplied by ``factor``."""
    return gram if factor == 1 else factor * gram + (1 - factor) * gram.diagonal().diag()


def regmean(taus: Tensor, context: Context, *, off_diagonal: float) -> Tensor:
    """``W = (sum_t a_t W_t G_t) (sum_t a_t G_t)^-1`` (arXiv 2212.09849): ``taus`` (T, o, i) -> (o, i).

    Off-diagonal entries of every Gram are first scaled by ``off_diagonal``: 0.9 in the paper, 0.95 in newer code. Task
    vectors may stand for weights because the base cancels. Solved in float64 as a correction of the mean,

        d = mean + [sum_t a_t (tau_t - mean) G_t] (sum_t a_t G_t)^+

    so that directions no task's inputs have, and matrices without Grams, are averaged; zero Grams contribute nothing.
    One expert gives that expert.
    """
    mean = weighted_mean(taus, context.weights)  # (o, i)
    if context.grams is None:
        return mean
    pooled = taus.new_zeros(taus.shape[2], taus.shape[2], dtype=torch.float64)  # (i, i)
    moment = torch.zeros_like(mean, dtype=torch.float64)  # (o, i)
    for tau, raw, weight in zip(taus, context.grams, context.weights.tolist(), strict=True):
        gram = weight * scale_off_diagonal(raw.double(), off_diagonal)  # (i, i)
        pooled += gram
        moment += (tau.double() - mean.double()) @ gram
    e, u = eigh_psd(pooled, f"{context.name}, pooled Gram")  # (i,), (i, i)
    # a Gram in float32 holds noise of that size: smaller eigenvalues are no evidence
    precision = max(torch.finfo(raw.dtype).eps for raw in context.grams)
    seen = e > precision * e[-1]
    gain = torch.where(seen, 1 / e.where(seen, torch.ones_like(e)), torch.zeros_like(e))  # (i,)
    return (mean.double() + (moment @ u * gain) @ u.mT).to(taus.dtype)
