"""Grams without data: a task vector's rows stand in for the inputs that made them (arXiv 2503.08099, 2605.12843)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import GramError
from .accumulate import gram_dtype


def datafree(task_vector: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``tau.T @ tau / ||tau||_F^2`` (i, i) of a task vector (o, i) or, flattened to that, (o, c, kh, kw).

    A gradient step moves a weight by a sum of outer products with the module's inputs, so a task vector's rows lie in
    the span of what the expert saw. The Gram has trace 1; a zero task vector gives zeros. In ``dtype``, by default
    float64 up to 4096 inputs on the CPU and float32 otherwise. Raises `GramError` for a vector or a non-finite value.
    """
    if task_vector.dim() < 2:
        raise GramError(
            f"task vector has shape {tuple(task_vector.shape)}", "only matrices and convolutions have a Gram"
        )
    tau = task_vector.detach().flatten(1)  # (o, i)
    tau = tau.to(dtype or gram_dtype(tau.shape[1], tau.device))
    if not bool(torch.isfinite(tau).all()):
        raise GramError("task vector holds non-finite values", "check base and expert for NaN or overflow")
    peak = tau.abs().max() if tau.numel() else tau.new_zeros(())
    if peak == 0:
        return tau.new_zeros(tau.shape[1], tau.shape[1])
    tau = tau / peak  # squares of small float32 entries would underflow
    return tau.mT @ tau / tau.square().sum()  # (i, i)


def hybrid(data: Tensor, data_free: Tensor, gamma: float) -> Tensor:
    """``(1 - gamma) * data + gamma * data_free`` (i, i), both brought to mean eigenvalue 1 first.

    For few calibration inputs. Where the data Gram is homogeneous (i + 1, i + 1) and the data-free one (i, i), the
    latter gets a zero row and column: a task vector says nothing about the bias. A zero Gram contributes nothing.
    Raises `GramError` for gamma outside [0, 1] or sizes that do not fit.
    """
    if not 0 <= gamma <= 1:
        raise GramError(f"gamma is {gamma}", "gamma, the data-free share, lies in [0, 1]")
    seen, free = hybrid_parts(data, data_free)
    return (1 - gamma) * seen + gamma * free


def hybrid_parts(data: Tensor, data_free: Tensor) -> tuple[Tensor, Tensor]:
    """The two Grams that `hybrid` mixes: of one size (i, i), and of mean eigenvalue 1 where they are not zero."""
    side, free_side = data.shape[-1], data_free.shape[-1]
    if data.shape != (side, side) or data_free.shape != (free_side, free_side) or side - free_side not in (0, 1):
        raise GramError(
            f"Grams are {tuple(data.shape)} and {tuple(data_free.shape)}",
            "the data Gram has the data-free Gram's size, or one more for a bias",
        )
    free = torch.nn.functional.pad(data_free.to(data), (0, side - free_side, 0, side - free_side))  # (i, i)
    return _unit_mean_eigenvalue(data), _unit_mean_eigenvalue(free)


def _unit_mean_eigenvalue(gram: Tensor) -> Tensor:
    trace = gram.diagonal().sum()
    return gram * (gram.shape[0] / trace) if trace > 0 else torch.zeros_like(gram)
