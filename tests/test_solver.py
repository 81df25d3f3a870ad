"""The solver against a float64 dense solve, and the limits that must hold exactly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.grams import datafree
from bmm.solver import prepare
from tests.problems import generator, pooled_of, problem

LAMS = (1e-6, 1e-3, 1e-1, 1.0, 30.0, 1e3, 1e6)


def dense(w0, experts, grams, anchor, lam, rho=1.0, weights=None, normalise="trace"):
    """The textbook formula, in float64, without any decomposition."""
    scaled = pooled_of(grams, weights, normalise)
    moment = sum(w.double() @ s for w, s in zip(experts, scaled, strict=True)) + lam * anchor.double()
    mean = torch.linalg.solve(sum(scaled) + lam * torch.eye(len(scaled[0]), dtype=torch.float64), moment.T).T
    return w0.double() + rho * (mean - w0.double())


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@settings(deadline=None, max_examples=60)
@given(
    o=st.integers(1, 12),
    i=st.integers(1, 24),
    experts=st.integers(1, 5),
    rank_share=st.floats(0, 1),
    decades=st.floats(0, 12),
    log_lam=st.floats(-6, 6),
    rho=st.floats(0.5, 1.5),
    anchor_size=st.sampled_from([0.0, 1.0, 1000.0]),
    normalise=st.sampled_from(["trace", "none"]),
    weights=st.lists(st.floats(0, 4), min_size=5, max_size=5),
    seed=st.integers(0, 10_000),
)
def test_merge_agrees_with_a_dense_solve(
    o, i, experts, rank_share, decades, log_lam, rho, anchor_size, normalise, weights, seed
):
    rank = max(1, round(rank_share * i))
    w0, ws, grams, anchor = problem(o, i, experts, rank, decades, seed, anchor_size=anchor_size)
    a = [0.0 if w < 0.05 else w for w in weights[:experts]]
    lam = 10.0**log_lam
    merged = prepare(w0, ws, grams, anchor, a, normalise).merge(lam, rho)
    assert merged.dtype == w0.dtype
    assert merged.shape == w0.shape
    assert relative(merged, dense(w0, ws, grams, anchor, lam, rho, a, normalise)) <= 1e-5


@pytest.mark.parametrize("rank", [1, 7, 48])
@pytest.mark.parametrize("decades", [0, 12])
def test_float64_models_merge_in_float64(rank, decades):
    w0, ws, grams, anchor = problem(16, 48, 3, rank, decades, dtype=torch.float64)
    prepared = prepare(w0, ws, grams, anchor)
    for lam in LAMS:
        assert relative(prepared.merge(lam), dense(w0, ws, grams, anchor, lam)) <= 1e-7


@pytest.mark.parametrize("samples", [5, 32, 400])
def test_grams_of_real_float32_activations_are_accurate_where_the_data_speak(samples):
    g = generator(3)
    xs = [torch.randn(samples, 32, generator=g) for _ in range(2)]
    w0, ws, _, anchor = problem(8, 32, 2)
    exact = [x.double().T @ x.double() / samples for x in xs]
    rounded = [x.T @ x / samples for x in xs]
    prepared = prepare(w0, ws, rounded, anchor)
    assert prepared.rank == min(32, 2 * samples)
    for lam in (1e-2, 1.0, 1e4):
        assert relative(prepared.merge(lam), dense(w0, ws, exact, anchor, lam)) <= 1e-5


def test_noise_of_float32_grams_is_no_evidence_even_without_regularisation():
    g = generator(4)
    x = torch.randn(7, 64, generator=g)
    w0, (w1,), _, anchor = problem(8, 64, 1)
    merged = prepare(w0, [w1], [x.T @ x / 7], anchor).merge(0.0)
    projector = torch.linalg.pinv(x.double()) @ x.double()
    expected = w1.double() @ projector + anchor.double() @ (torch.eye(64, dtype=torch.float64) - projector)
    assert relative(merged, expected) <= 1e-5


def test_infinite_lam_is_the_anchor_bit_for_bit():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        w0, ws, grams, anchor = problem(dtype=dtype, rank=4)
        prepared = prepare(w0, ws, grams, anchor)
        merged = prepared.merge(math.inf)
        assert merged.dtype == dtype
        assert torch.equal(merged, anchor)
        merged.zero_()  # a result is the caller's own
        assert torch.equal(prepared.merge(math.inf), anchor)
    w0, ws, grams, anchor = problem()
    halfway = prepare(w0, ws, grams, anchor).merge(math.inf, rho=0.5)
    torch.testing.assert_close(halfway, (w0 + anchor) / 2)


def test_large_lam_approaches_the_anchor():
    w0, ws, grams, anchor = problem(rank=4)
    prepared = prepare(w0, ws, grams, anchor)
    distances = [relative(prepared.merge(lam), anchor) for lam in (1.0, 1e2, 1e4)]
    assert distances[0] > 10 * distances[1] > 100 * distances[2] > 0


def test_zero_lam_is_regmean_where_the_pooled_gram_is_invertible():
    w0, ws, grams, anchor = problem(rank=6)  # three Grams of rank 6 span all 10 inputs
    scaled = pooled_of(grams)
    regmean = torch.linalg.solve(sum(scaled), sum(w.double() @ s for w, s in zip(ws, scaled, strict=True)).T).T
    assert relative(prepare(w0, ws, grams, anchor).merge(0.0), regmean) <= 1e-5


def test_one_expert_is_itself_on_its_inputs_and_the_anchor_off_them():
    w0, (w1,), (g1,), anchor = problem(experts=1, rank=4)
    merged = prepare(w0, [w1], [g1], anchor).merge(0.0).double()
    e, u = torch.linalg.eigh(g1)
    torch.testing.assert_close(merged @ u[:, e > 0.5], w1.double() @ u[:, e > 0.5], atol=1e-5, rtol=0)
    torch.testing.assert_close(merged @ u[:, e < 0.5], anchor.double() @ u[:, e < 0.5], atol=1e-5, rtol=0)


def test_datafree_grams_without_regularisation_minimise_the_wudi_objective():
    w0, ws, _, anchor = problem(o=4, i=20, experts=3, dtype=torch.float64)
    taus = [w - w0 for w in ws]

    def objective(tau):
        return sum(((tau - t) @ t.T).square().sum() / t.square().sum() for t in taus)

    solution = prepare(w0, ws, [datafree(t) for t in taus], anchor).merge(0.0) - w0
    variable = solution.clone().requires_grad_()
    objective(variable).backward()
    assert float(variable.grad.abs().max()) < 1e-10  # convex: a stationary point is a minimum
    assert float(objective(solution)) < 0.9 * float(objective(sum(taus)))
    rows = torch.cat(taus)  # off the row space of the task vectors nothing is known: the anchor
    off = torch.eye(20, dtype=torch.float64) - torch.linalg.pinv(rows) @ rows
    torch.testing.assert_close(solution @ off, (anchor - w0) @ off)


@pytest.mark.parametrize("lam", [0.01, 1.0, math.inf])
def test_order_of_experts_does_not_matter(lam):
    w0, ws, grams, anchor = problem(rank=5)
    weights, order = [0.5, 1.0, 2.0], [2, 0, 1]
    one = prepare(w0, ws, grams, anchor, weights).merge(lam)
    other = prepare(w0, [ws[t] for t in order], [grams[t] for t in order], anchor, [weights[t] for t in order])
    torch.testing.assert_close(one, other.merge(lam), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rank", [4, 10])
def test_commutes_with_an_orthogonal_change_of_basis(rank):
    w0, ws, grams, anchor = problem(rank=rank, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(10, 10, generator=generator(9), dtype=torch.float64))[0]
    turned = prepare(w0 @ q, [w @ q for w in ws], [q.T @ g @ q for g in grams], anchor @ q)
    for lam in (1e-3, 1.0):
        torch.testing.assert_close(turned.merge(lam, 0.8), prepare(w0, ws, grams, anchor).merge(lam, 0.8) @ q)


def test_a_zero_gram_or_weight_contributes_nothing():
    w0, ws, grams, anchor = problem()
    alone = prepare(w0, ws[:1], grams[:1], anchor).merge(0.1)
    with_zeros = prepare(w0, ws, [grams[0], torch.zeros(10, 10), torch.zeros(10, 10)], anchor).merge(0.1)
    torch.testing.assert_close(with_zeros, alone)
    torch.testing.assert_close(prepare(w0, ws, grams, anchor, [1.0, 0.0, 0.0]).merge(0.1), alone)


def test_without_any_evidence_the_anchor_stays():
    w0, ws, _, anchor = problem()
    prepared = prepare(w0, ws, [torch.zeros(10, 10)] * 3, anchor)
    assert prepared.rank == 0
    for lam in (0.0, 1e-6, 1.0, math.inf):
        assert torch.equal(prepared.merge(lam), anchor)
    torch.testing.assert_close(prepared.merge(1.0, 0.5), (w0 + anchor) / 2)
    torch.testing.assert_close(prepared.merge(torch.tensor(1.0), 0.5), (w0 + anchor) / 2)


def test_trace_normalisation_makes_a_grams_scale_irrelevant():
    w0, ws, grams, anchor = problem()
    scaled = [g * s for g, s in zip(grams, (1e-9, 1.0, 1e9), strict=True)]
    plain = prepare(w0, ws, grams, anchor).merge(0.3)
    torch.testing.assert_close(prepare(w0, ws, scaled, anchor).merge(0.3), plain, atol=1e-6, rtol=1e-5)
    raw = prepare(w0, ws, scaled, anchor, normalise="none").merge(0.3)
    assert relative(raw, plain) > 0.01
    tiny = prepare(w0, ws, [g * 1e-30 for g in grams], anchor, normalise="none").merge(0.0)
    torch.testing.assert_close(tiny, prepare(w0, ws, grams, anchor, normalise="none").merge(0.0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [3, 10])
@pytest.mark.parametrize("lam", [0.0, 0.2, math.inf])
def test_anchor_scale_is_the_merge_with_a_scaled_anchor(rank, lam):
    w0, ws, grams, anchor = problem(rank=rank)
    scaled = prepare(w0, ws, grams, anchor).merge(lam, 1.1, anchor_scale=0.25)
    direct = prepare(w0, ws, grams, w0 + 0.25 * (anchor - w0)).merge(lam, 1.1)
    torch.testing.assert_close(scaled, direct, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rank", [3, 10])
def test_merge_is_differentiable(rank):
    w0, ws, grams, anchor = problem(rank=rank, dtype=torch.float64)
    prepared = prepare(w0, ws, grams, anchor)
    inputs = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 0.9, 1.2)]
    assert torch.autograd.gradcheck(prepared.merge, inputs)
    for lam in (0.0, math.inf):
        at_limit = torch.tensor(lam, requires_grad=True)
        prepared.merge(at_limit).sum().backward()
        assert torch.isfinite(at_limit.grad)
    tensor = prepared.merge(torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(tensor, prepared.merge(0.3))
