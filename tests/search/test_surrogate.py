"""The conditioned Gaussian process against its textbook formulas, written out."""

import numpy as np
import pytest

from bmm.search.gp import Hyper
from bmm.search.surrogate import Surrogate

HYPER = Hyper(np.array([0.4, 0.9, 2.0]), 0.02, 0.3)


def data(n=15, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.random((n, 3))
    return x, 0.8 + 0.05 * (np.sin(4 * x[:, 0]) + x[:, 1] ** 2) + 0.003 * generator.standard_normal(n)


def covariance(a, b):
    return np.exp(-0.5 * (((a[:, None] - b[None]) / HYPER.lengthscales) ** 2).sum(-1))


def conditioned(x, y, z, scale, centre):
    """Mean and covariance at z, everything in the units of y."""
    gram = scale**2 * (covariance(x, x) + HYPER.noise * np.eye(len(x)))
    cross = scale**2 * covariance(z, x)
    mean = centre + scale * HYPER.mean
    return (
        mean + cross @ np.linalg.solve(gram, y - mean),
        scale**2 * covariance(z, z) - cross @ np.linalg.solve(gram, cross.T),
    )


def test_means_and_uncertain_sums():
    x, y = data()
    z, weights = np.random.default_rng(1).random((5, 3)), np.array([1.0, -2.0, 0.5, 0.0, 3.0])
    surrogate = Surrogate(x, y, HYPER)
    mean, joint = conditioned(x, y, z, surrogate.scale, surrogate.centre)
    np.testing.assert_allclose(surrogate.mean(z), mean, rtol=1e-12)
    value, sd = surrogate.combination(z, weights)
    assert value == pytest.approx(weights @ mean)
    assert sd == pytest.approx(np.sqrt(weights @ joint @ weights))


def test_a_point_differs_from_itself_by_nothing_for_sure():
    x, y = data()
    assert Surrogate(x, y).combination(x[[4, 4]], np.array([1.0, -1.0])) == (0.0, 0.0)


def test_leave_one_out_equals_leaving_each_out():
    x, y = data()
    surrogate = Surrogate(x, y, HYPER)
    means, variances = surrogate.leave_one_out()
    for i in range(len(x)):
        rest = np.arange(len(x)) != i
        mean, joint = conditioned(x[rest], y[rest], x[i : i + 1], surrogate.scale, surrogate.centre)
        assert means[i] == pytest.approx(mean[0], rel=1e-10)
        assert variances[i] == pytest.approx(joint[0, 0] + surrogate.noise**2, rel=1e-9)


def test_folds_are_predicted_by_models_that_never_saw_them():
    x, y = data()
    found = Surrogate(x, y, HYPER).cross_validated(4)
    out = np.arange(len(x)) % 4 == 2
    np.testing.assert_array_equal(found[out], Surrogate(x[~out], y[~out]).mean(x[out]))
    changed = Surrogate(x, np.where(out, y + 100, y), HYPER).cross_validated(4)
    np.testing.assert_array_equal(found[out], changed[out])


@pytest.mark.parametrize("k", range(3))
def test_partial_dependence_is_the_average_over_the_points(k):
    x, y = data()
    surrogate = Surrogate(x, y, HYPER)
    grid = np.array([0.0, 0.3, 1.0])
    means, deviations = surrogate.partial(k, grid)
    for value, mean, deviation in zip(grid, means, deviations, strict=True):
        moved = x.copy()
        moved[:, k] = value
        expected = surrogate.combination(moved, np.full(len(x), 1 / len(x)))
        assert (mean, deviation) == pytest.approx(expected, rel=1e-9)


def test_equal_outcomes_are_no_trouble():
    x, _ = data()
    surrogate = Surrogate(x, np.full(len(x), 0.7))
    assert surrogate.mean(x) == pytest.approx(0.7)
    assert np.isfinite(surrogate.leave_one_out()).all()
