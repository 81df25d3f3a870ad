"""Symmetric matrices as triangles."""

import pytest
import torch

from bmm.errors import GramError
from bmm.grams import GramStore, TaskGrams
from bmm.grams.triangle import packed, unpacked


@pytest.mark.parametrize("n", [1, 2, 7, 256, 257, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_triangle_is_its_matrix(n, dtype):
    x = torch.randn(n + 3, n, dtype=dtype, generator=torch.Generator().manual_seed(n))
    gram = x.T @ x
    gram = (gram + gram.T) / 2
    triangle = packed(gram)
    assert triangle.shape == (n * (n + 1) // 2,)
    assert triangle.dtype == dtype
    assert torch.equal(triangle, gram[tuple(torch.triu_indices(n, n))])
    assert torch.equal(unpacked(triangle), gram)


@pytest.mark.parametrize("count", [2, 4, 5, 7])
def test_other_lengths_are_refused(count):
    with pytest.raises(GramError, match="no triangle"):
        unpacked(torch.ones(count))


def test_a_cache_takes_half_of_its_grams_and_gives_back_the_same(tmp_path):
    x = torch.randn(500, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = x.T @ x
    gram = (gram + gram.T) / 2
    found = TaskGrams({"a": gram, "b": gram[:9, :9].clone()}, {"a": "a", "b": "b"}, {"a": 500, "b": 500})
    path = GramStore(tmp_path).save("f", found)
    assert path.stat().st_size < 0.51 * found.bytes
    back = GramStore(tmp_path).load("f")
    assert set(back.grams) == {"a", "b"}
    assert torch.equal(back.grams["a"], gram)
    assert torch.equal(back.grams["b"], gram[:9, :9])
