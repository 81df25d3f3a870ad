"""Batches, and Grams computed from them by hand."""

import torch


def seeded(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def batches_of(*shape, sizes=(3, 1, 4), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=g) for n in sizes]


def plain(model, batch):
    return model(batch)


def gram(x, bias=True):
    rows = x.detach().double().reshape(-1, x.shape[-1])
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1) if bias else rows
    return rows.T @ rows / len(rows)


def check(found, name, x, bias=True):
    torch.testing.assert_close(found.for_weight(name), gram(x, bias), atol=1e-6, rtol=1e-5)
    key = found.key_of[name]
    assert found.count[key] == x[..., 0].numel()
    assert found.has_bias[key] is bias
