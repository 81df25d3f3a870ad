import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.errors import RecipeError
from bmm.records import Hyperparameters
from bmm.search.space import Parameter, Space

names = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5, unique=True)
units = st.floats(0, 1)


def bounds(low, high):
    return st.tuples(st.floats(low, high), st.floats(low, high)).filter(lambda b: b[1] - b[0] > 1e-3)


@settings(deadline=None, max_examples=100)
@given(names, bounds(-8, 8), st.floats(0.0, 0.99), st.floats(1.01, 3.0), st.data())
def test_points_and_hyperparameters_round_trip(groups, log10_lam, rho_low, rho_high, data):
    space = Space.for_groups(groups, log10_lam, (rho_low, rho_high))
    assert space.groups == groups
    assert Space.from_json(space.to_json()) == space
    unit = np.array(data.draw(st.lists(units, min_size=len(space), max_size=len(space))))
    point = space.from_unit(unit)
    assert all(p.low <= point[p.name] <= p.high for p in space.parameters)
    np.testing.assert_allclose(space.to_unit(point), unit, atol=1e-10)
    hyperparameters = space.to_hyperparameters(point)
    assert Hyperparameters.from_json(hyperparameters.to_json()) == hyperparameters
    back = space.point_of(hyperparameters)
    assert back.keys() == point.keys()
    assert all(abs(back[name] - point[name]) <= 1e-12 for name in point)


@settings(deadline=None, max_examples=50)
@given(st.floats(0, math.inf), st.floats(-1e6, 1e6))
def test_point_of_stays_in_the_box(lam, rho):
    space = Space.for_groups(["attention", "mlp"])
    point = space.point_of(Hyperparameters.uniform(space.groups, lam, rho))
    assert all(p.low <= point[p.name] <= p.high for p in space.parameters)


def test_names_anchor_and_default():
    space = Space.for_groups(["q/0-3", "mlp"])
    assert [p.name for p in space.parameters] == ["log10_lam/q/0-3", "rho/q/0-3", "log10_lam/mlp", "rho/mlp"]
    assert len(space) == 4
    assert space.anchor() == Hyperparameters({"q/0-3": math.inf, "mlp": math.inf}, {"q/0-3": 1.0, "mlp": 1.0})
    assert space.default() == Hyperparameters({"q/0-3": 1.0, "mlp": 1.0}, {"q/0-3": 1.0, "mlp": 1.0})
    anchor_point = space.point_of(space.anchor())
    assert anchor_point == {"log10_lam/q/0-3": 3.0, "rho/q/0-3": 1.0, "log10_lam/mlp": 3.0, "rho/mlp": 1.0}
    zero = space.point_of(Hyperparameters.uniform(space.groups, 0.0))
    assert zero["log10_lam/mlp"] == -4.0


def test_default_moves_into_a_range_without_it():
    assert Space.for_groups(["all"], log10_lam=(1, 3)).default().lam == {"all": 10.0}
    assert Space.for_groups(["all"], log10_lam=(-3, -1)).default().lam["all"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("groups", "log10_lam", "rho", "said"),
    [
        ([], (-4, 3), (0.5, 1.5), "empty"),
        (["a", "a"], (-4, 3), (0.5, 1.5), "more than once"),
        ([""], (-4, 3), (0.5, 1.5), "empty name"),
        (["a"], (3, -4), (0.5, 1.5), "empty range"),
        (["a"], (2, 2), (0.5, 1.5), "empty range"),
        (["a"], (-math.inf, 3), (0.5, 1.5), "not a finite number"),
        (["a"], (-4, math.nan), (0.5, 1.5), "not a finite number"),
        (["a"], (-4, 3), (0.5, 0.9), "excludes 1"),
    ],
)
def test_senseless_spaces_are_refused(groups, log10_lam, rho, said):
    with pytest.raises(RecipeError, match=said):
        Space.for_groups(groups, log10_lam, rho)


def test_unpaired_unknown_and_misplaced_parameters_are_refused():
    lam, rho = Space.for_groups(["a"]).parameters
    with pytest.raises(RecipeError, match="rho/a"):
        Space((lam,))
    with pytest.raises(RecipeError, match="gamma/a"):
        Space((lam, rho, Parameter("gamma/a", 0, 1, 0)))
    with pytest.raises(RecipeError, match="default"):
        Parameter("rho/a", 0.5, 1.5, 2.0)


def test_foreign_points_and_hyperparameters_are_refused():
    space = Space.for_groups(["a"])
    with pytest.raises(RecipeError, match="rho/a"):
        space.to_hyperparameters({"log10_lam/a": 0.0})
    with pytest.raises(RecipeError, match="'a'"):
        space.point_of(Hyperparameters.uniform(["b"], 1.0))
    for lam, rho in ((-1.0, 1.0), (math.nan, 1.0), (1.0, math.nan), (1.0, math.inf)):
        with pytest.raises(RecipeError, match="lam must be"):
            space.point_of(Hyperparameters.uniform(["a"], lam, rho))
