"""Modules to merge, and the dense solve that the solver is held against."""

import torch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gram(i, rank, decades, g):
    """A PSD Gram (i, i) of the given rank, eigenvalues over so many decades, in float64."""
    q = torch.linalg.qr(torch.randn(i, i, generator=g, dtype=torch.float64))[0][:, :rank]
    return (q * torch.logspace(0, -decades, rank, dtype=torch.float64)) @ q.T


def problem(o=6, i=10, experts=3, rank=10, decades=0.0, seed=0, dtype=torch.float32, anchor_size=1.0):
    g = generator(seed)
    w0 = torch.randn(o, i, generator=g, dtype=dtype)
    taus = [0.3 * torch.randn(o, i, generator=g, dtype=dtype) for _ in range(experts)]
    grams = [gram(i, rank, decades, g) for _ in range(experts)]
    anchor = w0 + anchor_size * 0.4 * sum(taus)
    return w0, [w0 + tau for tau in taus], grams, anchor


def pooled_of(grams, weights=None, normalise="trace"):
    weights = weights or [1.0] * len(grams)
    scaled = []
    for a, raw in zip(weights, grams, strict=True):
        raw = raw.double()
        trace = float(raw.trace())
        scaled.append(a * raw * (len(raw) / trace if normalise == "trace" and trace > 0 else 1.0))
    return scaled
