"""WUDI and RegMean by hand and against their formulas."""

import numpy as np
import pytest
import torch

from bmm.anchors import get, merge
from bmm.anchors.regmean import regmean
from bmm.anchors.wudi import objective, wudi, wudi_exact
from bmm.errors import MergeError
from tests.anchors.kernels import SHAPES, assert_close, at, from_zero, random_taus, tensor

# -- WUDI -----------------------------------------------------------------------------------------------------------


def interference(d, taus):
    return sum(((d - tau) @ tau.mT).square().sum() / tau.square().sum() for tau in taus)


def test_wudi_by_hand():
    """(d - 1)^2 + (d - 2)^2 from d = 3: Adam's first step is its rate, the minimum is at 1.5."""
    assert from_zero("wudi", [[1]], [[2]], steps=0).item() == 3
    assert from_zero("wudi", [[1]], [[2]], steps=1, rate=0.01).item() == pytest.approx(2.99, abs=1e-6)
    assert from_zero("wudi_exact", [[1]], [[2]], ridge=0.0).item() == pytest.approx(1.5, abs=1e-6)
    # ridge 1 with largest eigenvalue 2: (d - 1)^2 + (d - 2)^2 + 2 (d - 3)^2 has its minimum at 2.25
    assert from_zero("wudi_exact", [[1]], [[2]], ridge=1.0).item() == pytest.approx(2.25, abs=1e-6)
    assert from_zero("wudi_exact", [[1]], [[2]], ridge=1.0, towards="mean").item() == pytest.approx(1.5, abs=1e-6)
    # task vectors that read different inputs do not interfere
    assert_close(from_zero("wudi_exact", [[1, 0]], [[0, 2]]), [[1, 2]])


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wudi_is_adam_on_the_published_objective(shape, dtype):
    taus = random_taus(shape).to(dtype)
    d = taus.double().sum(0).requires_grad_()
    adam = torch.optim.Adam([d], lr=1e-5)
    for _ in range(300):
        adam.zero_grad()
        interference(d, taus.double()).backward()
        adam.step()
    assert_close(wudi(taus, at(taus), steps=300, rate=1e-5), d.detach(), 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("towards", ["mean", "sum"])
def test_wudi_exact_matches_least_squares(shape, towards):
    taus = random_taus(shape).double()
    d = wudi_exact(taus, at(taus), ridge=0.0, towards=towards)
    start = taus.mean(0) if towards == "mean" else taus.sum(0)
    # rows of x solve x [tau_t^T / n_t]_t = [(tau_t - start) tau_t^T / n_t]_t with least norm
    units = np.concatenate([(tau / tau.norm()).numpy() for tau in taus])  # (T o, i)
    targets = np.concatenate([((tau - start) @ tau.mT / tau.norm()).numpy() for tau in taus], 1)  # (o, T o)
    x = np.linalg.lstsq(units, targets.T, rcond=1e-10)[0].T
    assert_close(d, start.numpy() + x, 1e-5)
    reported = objective(d, taus)
    assert reported == pytest.approx(float(interference(d, taus)), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("shape", [*SHAPES, (8, 30, 40), (3, 4, 50)])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_wudi_exact_interferes_no_more_than_adam(shape, size):
    taus = random_taus(shape, size=size)
    start = objective(taus.sum(0), taus)
    adam = objective(wudi(taus, at(taus), steps=300, rate=1e-5), taus)
    exact = objective(wudi_exact(taus, at(taus), ridge=1e-6, towards="sum"), taus)
    assert exact <= adam + 1e-6 * start
    if len(taus) > 1:
        assert adam < start


def test_wudi_ignores_experts_that_did_not_move():
    taus = random_taus((3, 6, 8))
    padded = torch.cat([taus, torch.zeros(1, 6, 8)])
    assert_close(wudi(padded, at(padded), steps=50, rate=1e-4), wudi(taus, at(taus), steps=50, rate=1e-4))
    exact = [wudi_exact(x, at(x), ridge=1e-6, towards="sum") for x in (padded, taus)]
    assert_close(*exact)


# -- RegMean --------------------------------------------------------------------------------------------------------


def test_regmean_by_hand():
    """Each expert decides about the input only it has seen; nobody has seen the third: the mean."""
    grams = {"w": [torch.diag(tensor(1, 0, 0)), torch.diag(tensor(0, 4, 0))]}
    assert_close(from_zero("regmean", [[1, 2, 3]], [[5, 6, 7]], grams=grams), [[1, 6, 5]])
    shared = {"w": [torch.diag(tensor(3)), torch.diag(tensor(1))]}
    assert_close(from_zero("regmean", [[1]], [[5]], grams=shared), [[2]])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 1.0])
def test_regmean_matches_its_formula(shape, off_diagonal):
    generator = torch.Generator().manual_seed(4)
    experts, rows, width = shape
    w0 = torch.randn(rows, width, generator=generator)
    wt = [w0 + tau for tau in random_taus(shape)]
    inputs = [torch.randn(50, width, generator=generator) for _ in range(experts)]
    grams = [x.mT @ x / 50 for x in inputs]
    merged = merge("regmean", {"w": w0}, [{"w": w} for w in wt], grams={"w": grams}, off_diagonal=off_diagonal)["w"]
    scaled = [np.where(np.eye(width), g, off_diagonal * g.double().numpy()) for g in grams]
    left = sum(w.double().numpy() @ g for w, g in zip(wt, scaled, strict=True))
    assert_close(merged, left @ np.linalg.inv(sum(scaled)))


def test_regmean_uses_the_weights_block_where_a_bias_joined():
    taus = [random_taus((4, 5), t) for t in range(2)]
    inputs = [torch.cat([random_taus((30, 5), 5 + t, 1.0), torch.ones(30, 1)], 1) for t in range(2)]
    joined = [x.mT @ x / 30 for x in inputs]
    plain = [g[:5, :5] for g in joined]
    assert_close(
        from_zero("regmean", *taus, grams={"w": joined}), from_zero("regmean", *taus, grams={"w": plain}), 1e-6
    )


def test_regmean_minimises_the_experts_output_error():
    """Without shrinking off-diagonals nothing does better on the experts' own inputs."""
    taus = random_taus((3, 4, 6), size=1.0)
    inputs = random_taus((3, 20, 6), 3, 1.0)
    grams = tuple(x.mT @ x for x in inputs)

    def error(d):
        return float(sum(((x @ (d - tau).mT) ** 2).sum() for x, tau in zip(inputs, taus, strict=True)))

    d = regmean(taus, at(taus, grams), off_diagonal=1.0)
    for seed in range(20):
        assert error(d) < error(d + random_taus((4, 6), seed, 0.01))


def test_regmean_averages_weights_without_grams():
    base = {"w": torch.zeros(2, 2), "v": torch.zeros(2, 2)}
    experts = [{"w": torch.eye(2), "v": torch.eye(2)}, {"w": -torch.eye(2), "v": 3 * torch.eye(2)}]
    grams = {"w": [torch.eye(2) * 3, torch.eye(2)]}
    merged = merge("regmean", base, experts, grams=grams)
    assert_close(merged["w"], np.eye(2) / 2)
    assert_close(merged["v"], 2 * np.eye(2))


def test_regmean_takes_a_convolution_with_one_output_for_a_weight():
    taus = [random_taus((1, 3, 2), t) for t in range(2)]
    inputs = random_taus((2, 20, 6), 3, 1.0)
    grams = {"w": [x.mT @ x for x in inputs]}
    flat = from_zero("regmean", *(tau.flatten(1) for tau in taus), grams=grams)
    assert_close(from_zero("regmean", *taus, grams=grams).flatten(1), flat)


def test_regmean_refuses_grams_that_do_not_fit():
    taus = [torch.ones(2, 3), torch.ones(2, 3)]
    for grams, match in (([torch.eye(3)], "1 Grams for 2 experts"), ([torch.eye(2)] * 2, r"a Gram is \(2, 2\)")):
        with pytest.raises(MergeError, match=match):
            from_zero("regmean", *taus, grams={"w": grams})
    with pytest.raises(MergeError, match="non-finite"):
        from_zero("regmean", *taus, grams={"w": [torch.full((3, 3), float("nan"))] * 2})


def test_every_matrix_kernel_commutes_with_a_change_of_basis_of_the_input():
    """Spectral and least-squares methods know no axes: rotating the inputs rotates the merge."""
    taus = random_taus((3, 6, 8))
    q = torch.linalg.qr(random_taus((8, 8), 3, 1.0)).Q
    for name in ("tsv", "iso_c", "iso_cts", "wudi_exact"):
        anchor = get(name)
        knobs = {k: v for k, v in anchor.defaults.items() if k != "scale"}
        straight, turned = (anchor.kernel(x, at(x), **knobs) for x in (taus, taus @ q))
        assert_close(turned, straight @ q, 1e-4)
