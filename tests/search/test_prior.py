"""What is known of the hyperparameters before the first trial."""

import math

import numpy as np

from bmm.search.prior import LENGTHSCALES, prior_of
from bmm.search.space import Space
from bmm.search.surrogate import Surrogate


def mode(space):
    prior = prior_of(space)
    return np.exp(prior.location - prior.scale**2)


def test_every_kind_of_parameter_has_a_lengthscale():
    space = Space.for_groups(["q"]).extended(gamma=0.5, weights={"a": 1.0}, anchor_scale=1.0)
    assert {p.name.partition("/")[0] for p in space.parameters} == set(LENGTHSCALES)
    assert mode(space).shape == (5,)


def test_lengthscales_are_in_the_parameters_own_units():
    wide, narrow = Space.for_groups(["q"], (-4, 3), (0, 3)), Space.for_groups(["q"], (-1, 1), (0.5, 1.5))
    np.testing.assert_allclose(mode(wide), np.array([3.3 / 7, 0.5 / 3]) * math.sqrt(2))
    np.testing.assert_allclose(mode(narrow), np.array([3.3 / 2, 0.5]) * math.sqrt(2))


def test_more_parameters_do_less_each():
    few, many = (Space.for_groups([str(i) for i in range(count)]) for count in (2, 18))
    np.testing.assert_allclose(mode(many)[:4] / mode(few), 3.0)


def test_with_few_trials_it_predicts_better_than_one_that_knows_nothing():
    """Nine groups whose rho matters, each about as much, and whose lam matters little; five draws."""
    space = Space.for_groups([str(i) for i in range(9)], (-4, 3), (0, 3))
    pull, errors = np.tile([0.05, 1.0], 9), []
    for seed in range(5):
        generator = np.random.default_rng(seed)
        optima = generator.uniform(0.3, 0.7, 18)
        x, far = generator.random((25, 18)), generator.random((200, 18))
        y, truth = (-((points - optima) ** 2 * pull).sum(1) for points in (x, far))
        errors.append([np.abs(Surrogate(x, y, prior=p).mean(far) - truth).mean() for p in (prior_of(space), None)])
    knowing, not_knowing = np.mean(errors, axis=0)
    assert knowing < 0.9 * not_knowing
