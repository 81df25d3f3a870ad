"""The closed-form fit against BoTorch's own model of the same priors."""

import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import check_grad

from bmm.search import gp


def data(n=18, d=4, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.random((n, d))
    y = np.sin(3 * x[:, 0]) - 2 * (x[:, 1] - 0.4) ** 2 + 0.05 * generator.standard_normal(n)
    return x, (y - y.mean()) / y.std(ddof=1)


def botorch_fit(x, y):
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from gpytorch.mlls import ExactMarginalLogLikelihood

    model = SingleTaskGP(torch.from_numpy(x), torch.from_numpy(y)[:, None], outcome_transform=None)
    likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_gpytorch_mll(likelihood)
    model.train()

    def density():
        with torch.no_grad():
            return float(likelihood(model(*model.train_inputs), model.train_targets))

    return model, density


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_is_as_good_as_botorchs_under_botorchs_own_density(seed):
    x, y = data(seed=seed)
    model, density = botorch_fit(x, y)
    theirs = density()
    found = gp.fit(gp.squared_differences(x), y)
    with torch.no_grad():
        model.covar_module.lengthscale = torch.from_numpy(found.lengthscales)
        model.likelihood.noise = torch.tensor([found.noise], dtype=torch.float64)
        model.mean_module.constant.fill_(found.mean)
    assert density() > theirs - 1e-3


def test_the_loss_has_the_right_gradient():
    x, y = data()
    generator = np.random.default_rng(5)
    loss = gp.Loss(gp.squared_differences(x), y, 0.01 * generator.random(len(x)))
    for _ in range(5):
        theta = np.concatenate([generator.normal(0, 0.5, 4), [-3 + generator.normal()], [generator.normal()]])
        assert check_grad(lambda t: loss(t)[0], lambda t: loss(t)[1], theta) < 1e-4


def test_the_loss_has_the_right_gradient_under_any_prior():
    x, y = data()
    prior = gp.Prior.around(np.array([0.3, 0.5, 1.0, 2.0]), 0.4)
    loss = gp.Loss(gp.squared_differences(x), y, prior=prior)
    theta = np.array([-1.0, 0.2, 0.4, 1.0, -2.5, 0.3])
    assert check_grad(lambda t: loss(t)[0], lambda t: loss(t)[1], theta) < 1e-4


def test_the_fit_is_the_priors_mode_where_nothing_is_known():
    prior = gp.Prior.around(np.array([0.3, 2.0]), 0.4)
    found = gp.fit(gp.squared_differences(np.array([[0.5, 0.5]])), np.zeros(1), prior=prior)
    np.testing.assert_allclose(found.lengthscales, [0.3, 2.0], rtol=1e-4)


def test_known_variances_are_not_taken_for_signal():
    x, y = data()
    noisy = y + np.random.default_rng(1).standard_normal(len(y))
    known = gp.fit(gp.squared_differences(x), noisy, np.ones(len(y)))
    assert known.noise < 0.1


@pytest.mark.parametrize("y", [[0.0, 0.0], [1.0, -1.0]])
def test_two_rows_are_enough(y):
    found = gp.fit(gp.squared_differences(np.array([[0.1, 0.2], [0.7, 0.9]])), np.array(y))
    assert np.isfinite([*found.lengthscales, found.noise, found.mean]).all()


def test_repeated_rows_are_no_trouble():
    x, y = data()
    found = gp.fit(gp.squared_differences(np.vstack([x] * 4)), np.concatenate([y] * 4))
    assert np.isfinite([*found.lengthscales, found.noise, found.mean]).all()
