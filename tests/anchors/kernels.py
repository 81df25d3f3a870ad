"""Task vectors for tests of single kernels."""

import numpy as np
import torch

from bmm.anchors import Context, merge

SHAPES = [(2, 6, 6), (3, 7, 12), (4, 12, 7), (1, 5, 8)]


def at(taus, grams=None, state=None, weights=None):
    """The context of a lone tensor, equal task weights unless given."""
    return Context(
        "w", taus[0], torch.ones(len(taus)) if weights is None else torch.tensor(weights), grams, state=state
    )


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def random_taus(shape, seed=0, size=0.05):
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def from_zero(name, *taus, **options):
    """The merged task vector of one-tensor models around a base of zeros."""
    experts = [{"w": torch.as_tensor(tau, dtype=torch.float32)} for tau in taus]
    return merge(name, {"w": torch.zeros_like(experts[0]["w"])}, experts, **options)["w"]


def assert_close(a, b, tolerance=1e-5):
    """Within ``tolerance`` of the largest entry."""
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-30)


# -- TIES -----------------------------------------------------------------------------------------------------------


def reference_ties(models, density, reduce):
    """``models``: one dict of arrays a task. Sort whole task vectors, then trim, elect and merge flat ones."""
    names = list(models[0])
    flat = np.stack([np.concatenate([m[n].reshape(-1) for n in names]) for m in models]).astype(np.float64)
    k = max(1, round(density * flat.shape[1]))
    for row in flat:
        row[np.abs(row) < np.sort(np.abs(row))[-k]] = 0
    sign = np.sign(flat.sum(0))
    sign[sign == 0] = np.sign(sign.sum())
    agree = (np.sign(flat) == sign) & (flat != 0)
    total = np.where(agree, flat, 0).sum(0)
    merged = total / np.maximum(agree.sum(0), 1) if reduce == "mean" else total
    ends = np.cumsum([models[0][n].size for n in names])
    return {n: part.reshape(models[0][n].shape) for n, part in zip(names, np.split(merged, ends[:-1]), strict=True)}
