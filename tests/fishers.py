"""Small models and their inputs for tests of Fishers."""

import torch
import torch.nn.functional as F


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(n=12, width=4):
    return torch.randn(n, width, generator=seeded(n))


def forward(model, x):
    return model(x)


def by_hand(model, x, y, apply=forward):
    """Mean of squared gradients, one backward pass an example."""
    parameters = dict(model.named_parameters())
    total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
    for k in range(len(y)):
        loss = F.cross_entropy(apply(model, x[k : k + 1]), y[k : k + 1])
        for (name, _), g in zip(
            parameters.items(), torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True
        ):
            total[name] += 0 if g is None else g.double().square()
    return {n: v / len(y) for n, v in total.items()}


def assert_close(a, b, rtol=1e-5):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name].double(), b[name].double(), rtol=rtol, atol=1e-9)
