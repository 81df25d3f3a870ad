"""How far a classifier's probabilities can be trusted: likelihood, calibration error, temperature (arXiv 1706.04599).

Everything takes log probabilities (n, classes) and labels (n,), and counts in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 15
"""Equal-width bins of confidence, as in the paper."""

COLDEST, HOTTEST = 0.02, 50.0
"""The range of temperatures: beyond it the softmax is one-hot or flat for any usual logits."""


def accuracy(log_probabilities: Tensor, labels: Tensor) -> float:
    """Share of inputs whose likeliest class is their label."""
    return float((log_probabilities.argmax(-1) == labels).double().mean())


def negative_log_likelihood(log_probabilities: Tensor, labels: Tensor) -> float:
    """Mean of ``-log p(label)`` in nats."""
    return -float(log_probabilities.double().gather(-1, labels.unsqueeze(-1)).mean())


def expected_calibration_error(log_probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """``sum_b (n_b / n) |accuracy_b - confidence_b|``, in [0, 1], over bins ``((b - 1) / bins, b / bins]`` of the
    likeliest class's probability."""
    confidence, chosen = log_probabilities.double().exp().max(-1)  # (n,)
    edges = torch.arange(1, bins, dtype=torch.float64, device=confidence.device) / bins  # (bins - 1,)
    place = torch.bucketize(confidence, edges)  # (n,)
    surplus = (chosen == labels).double() - confidence  # (n,)
    per_bin = torch.zeros(bins, dtype=torch.float64, device=confidence.device).index_add_(0, place, surplus)
    return float(per_bin.abs().sum() / len(labels))


def tempered(log_probabilities: Tensor, temperature: float) -> Tensor:
    """Log probabilities of the softmax of logits / ``temperature``; a constant a row in the logits does not matter."""
    return (log_probabilities.double() / temperature).log_softmax(-1)


def fit_temperature(log_probabilities: Tensor, labels: Tensor) -> float:
    """The temperature in [`COLDEST`, `HOTTEST`] with the least negative log-likelihood; 1 where none is below 1's.

    The likelihood is log-concave in 1 / temperature, so there is one minimum.
    """
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(tempered(log_probabilities, math.exp(log_temperature)), labels)

    found = minimize_scalar(
        loss, bounds=(math.log(COLDEST), math.log(HOTTEST)), method="bounded", options={"xatol": 1e-5}
    )
    return math.exp(found.x) if found.fun < loss(0.0) else 1.0
