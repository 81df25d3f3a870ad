"""Sobol indices: against tensor-grid integration of the same mean, and on functions with known shares."""

import numpy as np
import pytest

from bmm.analysis import sobol_indices
from bmm.search.gp import Hyper
from bmm.search.surrogate import Surrogate
from tests.analysis.studies import sobol_points


def integrated(surrogate, nodes=40):
    """First-order and total indices by Gauss-Legendre quadrature over the whole cube."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    points, weights, d = (points + 1) / 2, weights / 2, surrogate.x.shape[1]
    cube = np.stack(np.meshgrid(*[points] * d, indexing="ij"), -1).reshape(-1, d)
    values = surrogate.mean(cube).reshape([nodes] * d)

    def average(array, axes):
        for axis in sorted(axes, reverse=True):
            array = np.tensordot(array, weights, ([axis], [0]))
        return array

    def variance(array):
        every = range(array.ndim)
        return average(array**2, every) - average(array, every) ** 2

    whole = variance(values)
    others = [[k for k in range(d) if k != i] for i in range(d)]
    return (
        np.array([variance(average(values, o)) / whole for o in others]),
        np.array([1 - variance(average(values, [i])) / whole for i in range(d)]),
    )


@pytest.mark.parametrize("lengthscales", [[0.15, 0.6, 1.5], [0.5, 0.5, 300.0]])
def test_closed_form_equals_integration(lengthscales):
    x = np.random.default_rng(3).random((25, 3))
    y = np.sin(5 * x[:, 0]) * x[:, 1] + 0.3 * x[:, 2]
    surrogate = Surrogate(x, y, Hyper(np.array(lengthscales), 1e-3, 0.2))
    for found, expected in zip(sobol_indices(surrogate), integrated(surrogate), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-8)


def test_additive_function_has_its_known_shares():
    x = sobol_points(60, 4)
    first, total = sobol_indices(Surrogate(x, x @ np.array([3.0, 2.0, 1.0, 0.0])))
    shares = np.array([9, 4, 1, 0]) / 14  # the variance of a * u is a^2 / 12
    np.testing.assert_allclose(first, shares, atol=0.02)
    np.testing.assert_allclose(total, shares, atol=0.02)


def test_pure_interaction_is_all_total_and_no_first_order():
    x = sobol_points(60, 3)
    first, total = sobol_indices(Surrogate(x, (x[:, 0] - 0.5) * (x[:, 1] - 0.5)))
    np.testing.assert_allclose(first, 0, atol=0.03)
    np.testing.assert_allclose(total, [1, 1, 0], atol=0.03)


def test_many_parameters_and_short_lengthscales_stay_finite():
    x = np.random.default_rng(0).random((30, 48))
    found = sobol_indices(Surrogate(x, x[:, 0], Hyper(np.full(48, 0.025), 1e-4, 0.0)))
    assert np.isfinite(found).all()


def test_a_flat_mean_has_no_shares():
    x = sobol_points(16, 2)
    np.testing.assert_array_equal(sobol_indices(Surrogate(x, np.ones(16))), np.zeros((2, 2)))
