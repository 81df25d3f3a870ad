"""Fisher merging, gradient matching and MaTS against examples by hand and the papers' formulas in NumPy."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, cg

from bmm.anchors import get, merge
from bmm.anchors.mats import solve
from bmm.errors import MergeError

from .models import family, fisher_for, grams_for

WEIGHTS = [1.0, 0.5, 2.0]


def tensor(*values):
    return {"w": torch.tensor(values)}


def some_family(experts=3, seed=0):
    """A family, Fishers and Grams, and the same numbers as float64 arrays."""
    base, models = family(experts, seed)
    fishers = [fisher_for(m) for m in models]
    return base, models, fishers, fisher_for(base), grams_for(base, experts)


def arrays(stack, name):
    return np.stack([m[name].double().numpy() for m in stack])


def check(merged, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(merged[name].double().numpy(), value, rtol=1e-5, atol=1e-5, err_msg=name)


# -- Fisher ------------------------------------------------------------------------------------------------------------


def test_fisher_by_hand():
    base, a, b = tensor(0.0, 0.0, 0.0), tensor(1.0, 1.0, 1.0), tensor(5.0, 5.0, 5.0)
    merged = merge("fisher", base, [a, b], fisher=[tensor(3.0, 1.0, 0.0), tensor(1.0, 0.0, 0.0)], normalise="none")
    # (3 * 1 + 1 * 5) / 4; all of a but for the floor; nothing known: the mean
    np.testing.assert_allclose(merged["w"], [2.0, 1.0, 3.0], atol=1e-6)
    merged = merge("fisher", base, [a, b], fisher=[tensor(3.0, 0, 4), tensor(0.4, 0, 0.3)], floor=0.0)  # norms 5, 0.5
    np.testing.assert_allclose(merged["w"], [(0.6 + 0.8 * 5) / 1.4, 3.0, (0.8 + 0.6 * 5) / 1.4], rtol=1e-6)


@pytest.mark.parametrize("normalise", ["norm", "none"])
@pytest.mark.parametrize("floor", [1e-8, 0.01])
def test_fisher_follows_the_formula(normalise, floor):
    base, models, fishers, _, _ = some_family()
    norms = [1.0] * 3
    if normalise == "norm":
        norms = [np.sqrt(sum((f[n].double().numpy() ** 2).sum() for n in f)) for f in fishers]
    expected = {}
    for name in fishers[0]:
        h = arrays(fishers, name) / np.reshape(norms, (3, *[1] * base[name].dim()))
        h = np.maximum(h, floor) * np.reshape(WEIGHTS, (3, *[1] * base[name].dim()))
        expected[name] = (h * arrays(models, name)).sum(0) / h.sum(0)
    merged = merge("fisher", base, models, fisher=fishers, weights=WEIGHTS, normalise=normalise, floor=floor)
    check(merged, expected)


def test_equal_fishers_average_and_none_at_all_average_too():
    base, models, fishers, _, _ = some_family()
    mean = merge("average", base, models, weights=WEIGHTS)
    nothing = [{k: torch.zeros_like(v) for k, v in f.items()} for f in fishers]
    for same in ([fishers[0]] * 3, nothing, [{}] * 3):
        for floor in (1e-8, 0.0):
            check(merge("fisher", base, models, fisher=same, weights=WEIGHTS, floor=floor), mean)


def test_normalising_makes_the_scale_of_a_fisher_immaterial():
    base, models, fishers, _, _ = some_family()
    louder = [{k: 1e4 * v for k, v in fishers[0].items()}, *fishers[1:]]
    plain = merge("fisher", base, models, fisher=fishers)
    check(merge("fisher", base, models, fisher=louder), plain)
    dominated = merge("fisher", base, models, fisher=louder, normalise="none")
    assert (dominated["linear.weight"] - models[0]["linear.weight"]).abs().median() < 1e-3
    assert (plain["linear.weight"] - models[0]["linear.weight"]).abs().median() > 1e-2


def test_fishers_of_extreme_size_stay_finite():
    base, models = family(3)
    for value in (3e38, 1e-45, 0.0):
        fishers = [{k: torch.full_like(v, value) for k, v in m.items() if v.is_floating_point()} for m in models]
        for normalise in ("norm", "none"):
            merged = merge("fisher", base, models, fisher=fishers, normalise=normalise)
            check(merged, {"linear.weight": arrays(models, "linear.weight").mean(0)})
        merged = merge("gradient_matching", base, models, fisher=fishers, base_fisher=fishers[0], prior=0.0)
        assert all(torch.isfinite(v).all() for v in merged.values())


@pytest.mark.parametrize("name", ["fisher", "gradient_matching"])
@pytest.mark.parametrize(
    ("bad", "match"),
    [(-1.0, "negative entries"), (float("nan"), "Fisher holds"), (None, r"Fisher is \(2,\), not \(6,\)")],
)
def test_impossible_fishers_are_refused(name, bad, match):
    base, models, fishers, before, _ = some_family()
    broken = torch.ones(2) if bad is None else torch.full((6,), bad)
    with pytest.raises(MergeError, match=match) as error:
        merge(name, base, models, fisher=[*fishers[:2], fishers[2] | {"norm.weight": broken}], base_fisher=before)
    assert "norm.weight" in str(error.value)


# -- gradient matching -------------------------------------------------------------------------------------------------


def test_gradient_matching_by_hand():
    base, a, b = tensor(1.0, 1.0), tensor(2.0, 1.0), tensor(1.0, 3.0)
    merged = merge(
        "gradient_matching", base, [a, b], fisher=[tensor(1.0, 0.0), tensor(2.0, 3.0)], base_fisher=tensor(0.5, 0.0),
        prior=0.5, coefficient=1.0,
    )  # fmt: skip
    # H0 = (1, 0.5), Hbar = (4, 3.5): 1 + (1 + 1) * 1 / 4, 1 + (0.5 + 3) * 2 / 3.5
    np.testing.assert_allclose(merged["w"], [1.5, 3.0], rtol=1e-6)


@pytest.mark.parametrize(("coefficient", "prior"), [(1.0, 1e-8), (0.3, 0.01), (2.0, 10.0)])
def test_gradient_matching_follows_the_formula(coefficient, prior):
    base, models, fishers, before, _ = some_family()
    expected = {}
    for name in before:
        w0, h0 = base[name].double().numpy(), before[name].double().numpy() + prior
        a = coefficient * np.reshape(WEIGHTS, (3, *[1] * w0.ndim))
        h = arrays(fishers, name)
        expected[name] = w0 + (a * (h0 + h) * (arrays(models, name) - w0)).sum(0) / (h0 + (a * h).sum(0))
    options = {"fisher": fishers, "base_fisher": before, "weights": WEIGHTS}
    check(merge("gradient_matching", base, models, **options, coefficient=coefficient, prior=prior), expected)


def test_gradient_matching_minimises_the_quadratic_it_is_derived_from():
    """Experts are the minimisers of their quadratic loss plus a pull to the base; so must the merged model be of the
    sum: for quadratics the first-order argument is exact."""
    g = torch.Generator().manual_seed(4)
    theta0 = torch.randn(7, generator=g, dtype=torch.float64)
    h0, *h = torch.rand(4, 7, generator=g, dtype=torch.float64) + 0.1
    optima = torch.randn(3, 7, generator=g, dtype=torch.float64)
    experts = [(h0 * theta0 + ht * opt) / (h0 + ht) for ht, opt in zip(h, optima, strict=True)]
    best = (h0 * theta0 + sum(ht * opt for ht, opt in zip(h, optima, strict=True))) / (h0 + sum(h))
    merged = merge(
        "gradient_matching", {"w": theta0}, [{"w": e} for e in experts], fisher=[{"w": ht} for ht in h],
        base_fisher={"w": h0}, prior=0.0, coefficient=1.0,
    )  # fmt: skip
    torch.testing.assert_close(merged["w"], best)


def test_gradient_matching_lies_between_task_arithmetic_and_fisher_merging():
    base, models, fishers, before, _ = some_family()
    options = {"fisher": fishers, "base_fisher": before, "weights": WEIGHTS, "coefficient": 0.4}
    arithmetic = merge("task_arithmetic", base, models, weights=WEIGHTS, scale=0.4)
    check(merge("gradient_matching", base, models, **options, prior=1e6), arithmetic)
    options["base_fisher"] = {}
    merged = merge("gradient_matching", base, models, **options, prior=0.0)
    known = {k: torch.stack([f[k] for f in fishers]).amin(0) > 1e-6 for k in before}
    plain = merge("fisher", base, models, fisher=fishers, weights=WEIGHTS, normalise="none", floor=0.0)
    for name, where in known.items():
        torch.testing.assert_close(merged[name][where], plain[name][where], rtol=1e-5, atol=1e-5)
    nothing = merge("gradient_matching", base, models, **(options | {"fisher": [{}] * 3}), prior=0.0)
    check(nothing, {k: v for k, v in arithmetic.items() if v.is_floating_point()})


# -- MaTS --------------------------------------------------------------------------------------------------------------


def system(size=12, rank=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rank or 3 * size, size, generator=g, dtype=torch.float64) * torch.logspace(0, 0.7, size)
    a = x.mT @ x / len(x)
    solution, start = torch.randn(2, 5, size, generator=g, dtype=torch.float64)
    return a, solution, start


def test_conjugate_gradients_solve_and_say_how():
    a, solution, start = system()
    errors, previous = [], None
    for iterations in range(13):
        found = solve(lambda x: x @ a, solution @ a, start, iterations=iterations, tolerance=0.0)
        assert found.iterations == iterations
        assert len(found.residuals) == iterations + 1
        gap = found.value - solution
        errors.append(float((gap @ a * gap).sum()))
        true = float((solution @ a - found.value @ a).norm() / (solution @ a).norm())
        assert found.residuals[-1] == pytest.approx(true, rel=1e-6, abs=1e-12)
        assert previous is None or found.residuals[:-1] == previous
        previous = found.residuals
        operator = LinearOperator((60, 60), matvec=lambda v: (v.reshape(5, 12) @ a.numpy()).ravel(), dtype=float)
        given = {"b": (solution @ a).numpy().ravel(), "x0": start.numpy().ravel()}
        peer, _ = cg(operator, **given, maxiter=iterations, rtol=0.0, atol=0.0)
        np.testing.assert_allclose(found.value.numpy().ravel(), peer if iterations else given["x0"], atol=1e-8)
    assert all(later < earlier for earlier, later in pairwise(errors))  # CG's guarantee
    assert errors[-1] < 1e-12 * errors[0]  # as many iterations as A has different eigenvalues


def test_conjugate_gradients_stop_where_they_should():
    a, solution, start = system()
    product, target = (lambda x: x @ a), solution @ a
    at_once = solve(product, target, solution, iterations=50, tolerance=1e-12)
    assert at_once.iterations == 0
    assert torch.equal(at_once.value, solution)
    early = solve(product, target, start, iterations=50, tolerance=0.1)
    assert early.residuals[-1] <= 0.1 < early.residuals[-2]
    nothing = solve(lambda x: 0 * x, 0 * target, start, iterations=50, tolerance=0.0)
    assert nothing.iterations == 0
    assert torch.equal(nothing.value, start)
    capped = solve(product, target, start, iterations=10_000, tolerance=0.0)  # rounding is not iterated on for ever
    assert torch.isfinite(capped.value).all()
    torch.testing.assert_close(capped.value, solution)


def test_conjugate_gradients_leave_what_the_matrix_does_not_see():
    a, solution, start = system(rank=4)
    found = solve(lambda x: x @ a, solution @ a, start, iterations=100, tolerance=1e-13)
    seen = a @ torch.linalg.pinv(a, hermitian=True, rtol=1e-10)
    torch.testing.assert_close(found.value, start + (solution - start) @ seen, rtol=1e-6, atol=1e-6)


def test_mats_by_hand():
    base, a, b = ({"w": torch.tensor([[x, y]])} for x, y in ((0.0, 0.0), (1.0, 4.0), (3.0, 8.0)))
    grams = {"w": [torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([1.0, 0.0]))]}
    # the first input is solved, (3 * 1 + 1 * 3) / 4; nothing reaches the second, it stays in the start
    for start, rest in (("mean", 6.0), ("sum", 12.0), ("base", 0.0)):
        np.testing.assert_allclose(merge("mats", base, [a, b], grams=grams, start=start)["w"], [[1.5, rest]], rtol=1e-6)


@pytest.mark.parametrize("start", ["mean", "sum", "base"])
@pytest.mark.parametrize("off_diagonal", [1.0, 0.9])
def test_mats_follows_the_formula(start, off_diagonal):
    base, models, _, _, grams = some_family()
    mean = merge("average", base, models, weights=WEIGHTS)
    expected = {k: v.double().numpy() for k, v in mean.items() if v.is_floating_point()}
    for name, stack in grams.items():
        left, right = 0, 0
        for a, model, gram in zip(WEIGHTS, models, stack, strict=True):
            full = gram.double().numpy()
            scaled = a * (off_diagonal * full + (1 - off_diagonal) * np.diag(np.diag(full)))
            left, right = left + scaled, right + model[name].double().numpy().reshape(-1, len(full)) @ scaled
        expected[name] = np.linalg.solve(left, right.T).T.reshape(base[name].shape)
    options = {"grams": grams, "weights": WEIGHTS, "start": start, "off_diagonal": off_diagonal}
    check(merge("mats", base, models, **options, tolerance=1e-9), expected)


def test_mats_stopped_at_once_is_its_start():
    base, models, _, _, grams = some_family()
    plain = {
        "mean": merge("average", base, models),
        "sum": merge("task_arithmetic", base, models, scale=1.0),
        "base": base,
    }
    for start, other in plain.items():
        merged = merge("mats", base, models, grams=grams, start=start, iterations=0)
        check(merged, {k: other[k] for k in grams})
        few = merge("mats", base, models, grams=grams, start=start, iterations=1)
        assert any(not torch.equal(few[k], merged[k]) for k in grams)


def test_mats_averages_what_has_no_gram_by_fishers_where_given():
    base, models, fishers, _, grams = some_family()
    assert get("mats").takes == {"fisher"}
    plain = merge("mats", base, models, grams=grams)
    merged = merge("mats", base, models, grams=grams, fisher=fishers)
    by_fisher = merge("fisher", base, models, fisher=fishers, normalise="none")
    mean = merge("average", base, models)
    for name in base:
        if name in grams:
            assert torch.equal(merged[name], plain[name])
        elif base[name].is_floating_point():
            torch.testing.assert_close(merged[name], by_fisher[name])
            torch.testing.assert_close(plain[name], mean[name])
    assert not torch.equal(merged["position"], plain["position"])
    assert not torch.equal(merged["norm.weight"], plain["norm.weight"])


def test_mats_and_regmean_agree():
    base, models, _, _, grams = some_family()
    check(
        merge("mats", base, models, grams=grams, off_diagonal=0.9, tolerance=1e-9),
        merge("regmean", base, models, grams=grams, off_diagonal=0.9),
    )


def test_mats_does_not_iterate_on_the_noise_of_its_grams():
    g = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(4, 9)}
    models = [{"w": torch.randn(4, 9, generator=g)} for _ in range(3)]
    inputs = [torch.randn(20, 3, generator=g) @ torch.randn(3, 9, generator=g) for _ in range(3)]
    grams = {"w": [(x.mT @ x / 20).bfloat16() for x in inputs]}
    exact = merge("mats", base, models, grams=grams, tolerance=0.0, iterations=1000)
    asked = merge("mats", base, models, grams=grams, tolerance=torch.finfo(torch.bfloat16).eps, iterations=1000)
    assert torch.equal(exact["w"], asked["w"])
