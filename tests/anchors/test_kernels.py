"""Average, task arithmetic and TIES by hand and against their formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.anchors import merge
from bmm.anchors.anchor import Whole
from bmm.anchors.ties import global_cuts, scan_ties, ties
from tests.anchors.kernels import assert_close, at, from_zero, random_taus, reference_ties, tensor

from .models import float32_lists

# -- average, task arithmetic ---------------------------------------------------------------------------------------


def test_average_and_task_arithmetic_by_hand():
    base = {"w": tensor(1, 1)}
    experts = [{"w": tensor(2, 5)}, {"w": tensor(4, -1)}]
    assert merge("average", base, experts)["w"].tolist() == [3, 2]
    assert merge("task_arithmetic", base, experts, scale=0.5)["w"].tolist() == [3, 2]
    assert merge("task_arithmetic", base, experts, scale=1)["w"].tolist() == [5, 3]


def test_ties_by_hand():
    a, b = [4, -1, 2, 0], [-3, -2, 1, 0.5]
    assert from_zero("ties", a, b, density=0.5).tolist() == [4, -2, 2, 0]
    assert from_zero("ties", a, b, density=1.0).tolist() == [4, -1.5, 1.5, 0.5]
    assert from_zero("ties", a, b, density=1.0, reduce="sum", scale=0.5).tolist() == [2, -1.5, 1.5, 0.25]


def test_ties_trims_over_the_whole_model():
    base = {"large": torch.zeros(4), "small": torch.zeros(4)}
    expert = {"large": tensor(5, -6, 7, 8), "small": tensor(1, 2, 3, 4)}
    merged = merge("ties", base, [expert], density=0.5)
    assert merged["large"].tolist() == [5, -6, 7, 8]
    assert merged["small"].tolist() == [0, 0, 0, 0]


def test_cancelling_entries_take_the_majority_sign_of_the_model():
    assert from_zero("ties", [1, 2, 0, 0], [-1, 1, 3, -1], density=1.0).tolist() == [1, 1.5, 3, -1]
    assert from_zero("ties", [1, -2, 0], [-1, -1, -3], density=1.0).tolist() == [-1, -1.5, -3]
    assert from_zero("ties", [1, 2], [-1, -2], density=1.0).tolist() == [0, 0]  # a draw


def test_entries_equal_to_the_cut_all_stay():
    assert from_zero("ties", [1, -1, 1, 0.5], density=0.25).tolist() == [1, -1, 1, 0]
    assert from_zero("ties", [0, 0, 0, 2], density=0.75).tolist() == [0, 0, 0, 2]


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_ties_matches_its_formula(density, reduce):
    models = [{"a": random_taus((30, 7), t), "b": random_taus((50,), 9 + t, 0.2)} for t in range(5)]
    base = {k: torch.zeros_like(v) for k, v in models[0].items()}
    merged = merge("ties", base, models, density=density, reduce=reduce)
    reference = reference_ties([{k: v.numpy() for k, v in m.items()} for m in models], density, reduce)
    for name in base:
        assert_close(merged[name], reference[name])


@settings(deadline=None, max_examples=60)
@given(
    values=float32_lists(),
    split=st.integers(0, 40),
    density=st.floats(0.001, 1.0),
)
def test_cuts_are_the_exact_order_statistic(values, split, density):
    flat = torch.tensor(values, dtype=torch.float32)
    stream = [(str(n), part[None]) for n, part in enumerate((flat[:split], flat[split:]))]
    k = max(1, round(density * len(flat)))
    assert global_cuts(stream, density) == (float(flat.abs().sort(descending=True).values[k - 1]),)


def test_signs_are_elected_alike_in_any_order():
    """1e8 + 1 - 1e8 - 0.5 is positive; adding in float32 gives either sign."""
    taus = tensor([1e8], [1.0], [-1e8], [-0.5])
    for order in ([0, 1, 2, 3], [0, 2, 1, 3], [3, 1, 0, 2]):
        state = scan_ties([("w", taus[order])], {"density": 1.0}, Whole(torch.ones(len(taus)), {}, ()))
        assert ties(taus[order], at(taus, state=state), density=1.0, reduce="sum") > 0
