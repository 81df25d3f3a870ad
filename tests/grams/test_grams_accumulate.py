import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.errors import GramError
from bmm.grams import GramAccumulator, accumulate
from bmm.grams.accumulate import CHUNK_ROWS, gram_dtype


def inputs(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(deadline=None, max_examples=40)
@given(
    dim=st.integers(1, 9), sizes=st.lists(st.integers(0, 17), min_size=1, max_size=6), homogeneous=st.booleans(),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_streaming_equals_one_shot(dim, sizes, homogeneous, seed):
    x = inputs(sum(sizes), dim, seed=seed)
    streamed = GramAccumulator(dim, homogeneous)
    for part in x.split(sizes):
        streamed.update(part)
    rows = torch.cat([x, torch.ones(len(x), 1)], dim=1).double() if homogeneous else x.double()
    torch.testing.assert_close(streamed.gram(), rows.T @ rows / max(len(x), 1), atol=1e-12, rtol=1e-12)
    assert streamed.count == len(x)


def test_leading_shape_does_not_matter():
    x = inputs(4, 5, 6, 3)
    flat, deep = GramAccumulator(3), GramAccumulator(3)
    flat.update(x.reshape(-1, 3))
    deep.update(x)
    deep_rows = GramAccumulator(3)
    for row in x.reshape(-1, 3):
        deep_rows.update(row)
    assert torch.equal(flat.gram(), deep.gram())
    torch.testing.assert_close(deep_rows.gram(), flat.gram())
    assert flat.count == deep.count == deep_rows.count == 120


def test_more_rows_than_a_chunk():
    x = inputs(2 * CHUNK_ROWS + 3, 2)
    accumulator = GramAccumulator(2)
    accumulator.update(x)
    torch.testing.assert_close(accumulator.gram(), x.double().T @ x.double() / len(x))


def test_float64_while_it_is_cheap():
    assert GramAccumulator(8).gram().dtype == torch.float64
    assert gram_dtype(4096) == torch.float64
    assert gram_dtype(4097) == gram_dtype(64, "cuda") == torch.float32
    assert GramAccumulator(8, dtype=torch.float32).gram().dtype == torch.float32


def test_half_precision_and_autocast_inputs_are_widened_first():
    x = inputs(300, 4, dtype=torch.bfloat16)
    accumulator = GramAccumulator(4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        accumulator.update(x)
    torch.testing.assert_close(accumulator.gram(), (x.double().T @ x.double() / 300).float(), rtol=1e-5, atol=1e-6)


def test_adding_and_copying():
    x = inputs(10, 3)
    whole, first, second = (GramAccumulator(3, homogeneous=True) for _ in range(3))
    whole.update(x)
    first.update(x[:4])
    second.update(x[4:])
    before = first.copy()
    first.add(second)
    torch.testing.assert_close(first.gram(), whole.gram())
    assert first.count == 10
    assert before.count == 4
    with pytest.raises(GramError, match="cannot add"):
        first.add(GramAccumulator(3))


def test_nothing_seen_is_zero():
    assert torch.equal(GramAccumulator(3).gram(), torch.zeros(3, 3, dtype=torch.float64))


def test_gradients_and_inference_mode_leave_no_trace():
    accumulator = GramAccumulator(3)
    accumulator.update(inputs(5, 3).requires_grad_())
    with torch.inference_mode():
        accumulator.update(inputs(5, 3))
        born = GramAccumulator(3)
    born.update(inputs(5, 3))
    assert born.count == 5
    gram = accumulator.gram()
    assert not gram.requires_grad
    assert not gram.is_inference()
    assert accumulator.count == 10


@pytest.mark.parametrize("shape", [(), (5, 4), (3, 3, 2)])
def test_wrong_size_is_refused(shape):
    with pytest.raises(GramError, match="shape"):
        GramAccumulator(3).update(torch.ones(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_nan_and_overflow_are_reported(value):
    accumulator = GramAccumulator(2)
    accumulator.update(torch.tensor([[1.0, value]], dtype=torch.float64))
    with pytest.raises(GramError, match="non-finite"):
        accumulator.gram()


@pytest.mark.parametrize("panel", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("homogeneous", [False, True])
def test_panels_make_the_whole_matrix(panel, homogeneous, monkeypatch):
    monkeypatch.setattr(accumulate, "PANEL", panel)
    monkeypatch.setattr(accumulate, "CHUNK_ROWS", 4)
    accumulator, other = GramAccumulator(6, homogeneous), GramAccumulator(6, homogeneous)
    x = inputs(11, 6, dtype=torch.float64)
    accumulator.update(x[:7])
    other.update(x[7:])
    accumulator.add(other)
    rows = torch.cat([x, x.new_ones(11, 1)], 1) if homogeneous else x
    for gram in (accumulator.gram(), accumulator.gram(), accumulator.finish()):  # the first two leave the sum alone
        torch.testing.assert_close(gram, rows.T @ rows / 11, rtol=1e-12, atol=1e-12)
        assert torch.equal(gram, gram.T)
