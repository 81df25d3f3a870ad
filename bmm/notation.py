"""Glossary: the symbols every kernel uses, and the type aliases that go with them.

    T        number of experts (tasks), t = 1..T
    w0       (o, i) a module's base weight; ``y = x @ w0.T`` as in ``torch.nn.Linear``
    wt       (o, i) expert t's weight
    tau_t    (o, i) task vector ``wt - w0``
    wa, d    (o, i) anchor weight and its task vector ``wa - w0``
    gram     (i, i) ``x.T @ x / n`` of the inputs that reach a module; (i + 1, i + 1) where a bias joins
    a_t      scalar >= 0, weight of task t
    lam      scalar > 0, prior precision (regularisation strength)
    rho      scalar, assembly scale: ``w0 + rho * (m - w0)``
    gamma    [0, 1] share of the data-free Gram in a hybrid Gram

``o`` is out_features, ``i`` in_features. Trailing comments such as ``# (o, i)`` give the shape of the line's result.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

StateDict = dict[str, Tensor]
"""Tensors by parameter name, all in memory."""

Tensors = Mapping[str, Tensor]
"""Tensors by parameter name, possibly read from disk on access."""
