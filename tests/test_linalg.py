"""The largest magnitude by the bits is the one by the numbers."""

import math

import pytest
import torch

from bmm import linalg
from bmm.linalg import all_finite, largest, product

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_magnitude(dtype):
    generator = torch.Generator().manual_seed(0)
    for sign in (1, -1, 0):
        raw = torch.randn(7, 33, generator=generator, dtype=torch.float64)
        x = ((raw.abs() * sign) if sign else raw).to(dtype)
        assert largest(x) == float(x.double().abs().max())
        assert largest(x.mT[1:]) == float(x.mT[1:].double().abs().max())  # not contiguous
        assert largest(x.view(-1)[1:]) == float(x.view(-1)[1:].double().abs().max())  # not aligned
    limits = torch.finfo(dtype)
    for value in (limits.max, -limits.max, limits.tiny, -limits.tiny, limits.smallest_normal / 2, 0.0, -0.0):
        assert largest(torch.tensor(value, dtype=dtype)) == abs(float(torch.tensor(value, dtype=dtype)))
    assert largest(torch.empty(0, 4, dtype=dtype)) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found_among_anything(dtype, value):
    x = torch.linspace(-3, 3, 50, dtype=torch.float64).to(dtype)
    for at in (0, 20, 49):
        y = x.clone()
        y[at] = math.copysign(1.0, value) * abs(value)
        assert not math.isfinite(largest(y))
        assert math.isnan(largest(y)) == math.isnan(value)
        assert not all_finite(y)
    y = torch.tensor([math.nan, math.inf, 1.0], dtype=dtype)
    assert math.isnan(largest(y))
    assert all_finite(x)


@pytest.mark.parametrize("turned", [False, True])
def test_large_products_are_products(turned, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(40, 301, generator=generator), torch.randn(301, 77, generator=generator)
    right = right.mT.contiguous().mT if turned else right
    monkeypatch.setattr(linalg, "LARGE_PRODUCT", 1)
    exact = left.double() @ right.double()
    for a, b in ((left, right), (left[::2], right[:, ::3]), (left.mT[:60].mT, right[:60])):
        wanted = a.double() @ b.double()
        found = product(a, b)
        assert found.layout == torch.strided
        assert float((found - wanted).abs().max()) < 2e-6 * float(exact.abs().max())
    with torch.inference_mode():
        assert torch.equal(product(left, right), product(left, right))
    assert torch.equal(product(left.double(), right.double()), exact)
    scale = torch.tensor(2.0, requires_grad=True)
    product(scale * left, right).sum().backward()
    torch.testing.assert_close(float(scale.grad), float(exact.sum()), rtol=1e-3, atol=1e-2)
    assert product(left.to("meta"), right.to("meta")).shape == (40, 77)
