"""What may be searched besides lam and rho: task weights, gamma and the anchor's scale."""

import json
import math

import numpy as np
import pytest
import torch
from bmm_cli.options import load_recipe
from bmm_cli.tune import command as tune_command
from click.testing import CliRunner

import bmm
from bmm.errors import RecipeError
from bmm.merging import prepare_model
from bmm.recipe import Recipe
from bmm.records import Hyperparameters, Trial
from bmm.repool import SAFE_RATIO, InputGrams, Mix
from bmm.repool import Trial as Pooled
from bmm.report.tables import hyperparameter_table
from bmm.run import Run
from bmm.search.space import Space
from tests.family import TASKS

WEIGHTS = (1.0, 0.5, 2.0)
EVERYTHING = ("weights", "gamma", "anchor_scale")


@pytest.fixture(scope="module")
def run(family):
    return Run(Recipe.from_dict(family.recipe(anchor="task_arithmetic", norms="regression")))


@pytest.fixture(scope="module")
def grams(run):
    return run.collect_grams()


@pytest.fixture(scope="module")
def anchor(run):
    return run.anchor()


def prepared(run, anchor, grams, **options):
    return prepare_model(run.pool, anchor, grams, scheme="role", **{"search": EVERYTHING} | options)


def point(model, lam=0.3, rho=1.1, **extras):
    return Hyperparameters(dict.fromkeys(model.groups, lam), dict.fromkeys(model.groups, rho), **extras)


def assert_close(one, two, tolerance=1e-6):
    assert one.keys() == two.keys()
    for name in one:
        if one[name].is_floating_point():
            error = (one[name].double() - two[name].double()).norm()
            assert error <= tolerance * max(float(two[name].double().norm()), 1e-12), (name, float(error))


@pytest.mark.parametrize("source", ["data", "datafree", "hybrid"])
@pytest.mark.parametrize("normalise", ["trace", "none"])
@pytest.mark.parametrize("lam", [1e-4, 0.3, 1e3])
def test_the_pooled_path_equals_the_prepared_one_at_the_recipes_values(run, anchor, grams, source, normalise, lam):
    """The same numbers once by eigendecomposition, once by Cholesky or a second eigendecomposition."""
    model = prepared(run, anchor, grams, source=source, normalise=normalise, gamma=0.3, weights=WEIGHTS)
    trial = Pooled(model.mix)
    for slot in model.slots:
        fast = slot.prepared.merge(lam, 1.1, 0.8)
        slow = slot.evidence.merge(lam, 1.1, 0.8, trial)
        assert fast.dtype == slow.dtype
        assert fast.shape == slow.shape
        assert (fast - slow).norm() <= 1e-6 * fast.norm(), slot.weight


@pytest.mark.parametrize("source", ["data", "hybrid"])
@pytest.mark.parametrize("lam", [0.0, 1e-7, 0.3])
def test_other_weights_and_gamma_equal_a_model_prepared_with_them(run, anchor, grams, source, lam):
    model = prepared(run, anchor, grams, source=source, gamma=0.5)
    gamma = {"gamma": 0.2} if source == "hybrid" else {}
    moved = model.merge(point(model, lam, weights=dict(zip(TASKS, WEIGHTS, strict=True)), **gamma))
    again = prepared(run, anchor, grams, source=source, weights=WEIGHTS, search=(), **gamma)
    assert_close(moved, again.merge(point(again, lam)))
    draws = [
        m.sample(p, 0.1, torch.Generator().manual_seed(3))["fc1.weight"]
        for m, p in (
            (model, point(model, 0.3, weights=dict(zip(TASKS, WEIGHTS, strict=True)), **gamma)),
            (again, point(again, 0.3)),
        )
    ]
    # eigenvectors are unique up to their sign only, so the draws agree in distribution, not entry by entry
    assert torch.isfinite(draws[0]).all()
    torch.testing.assert_close(draws[0].std(), draws[1].std(), rtol=0.1, atol=0)


def test_weights_equal_a_dense_float64_solve(run, anchor, grams):
    model = prepared(run, anchor, grams)
    weights = dict(zip(TASKS, (0.25, 4.0, 1.5), strict=True))
    merged = model.merge(point(model, 0.05, 0.9, weights=weights, anchor_scale=1.3))

    def joined(tensors):
        return np.concatenate([tensors["fc1.weight"].double(), tensors["fc1.bias"].double()[:, None]], 1)

    w0, wa = joined(run.pool.base), joined(anchor)
    d = 1.3 * (wa - w0)
    top, bottom = 0.05 * d, 0.05 * np.eye(w0.shape[1])
    for name, task, expert in zip(TASKS, grams, run.pool.experts, strict=True):
        gram = task.for_weight("fc1.weight").double().numpy()
        gram = weights[name] * gram * len(gram) / np.trace(gram)
        top, bottom = top + (joined(expert) - w0) @ gram, bottom + gram
    expected = w0 + 0.9 * np.linalg.solve(bottom, top.T).T
    assert np.linalg.norm(joined(merged) - expected) <= 1e-6 * np.linalg.norm(expected)


def test_extras_at_the_recipes_values_change_not_one_bit(run, anchor, grams):
    model = prepared(run, anchor, grams, source="hybrid", gamma=0.3, weights=WEIGHTS)
    plain = prepared(run, anchor, grams, source="hybrid", gamma=0.3, weights=WEIGHTS, search=())
    space = Space.for_groups(model.groups).extended(0.3, dict(zip(TASKS, WEIGHTS, strict=True)), 1.0)
    for there, bare in (
        (space.default(), Hyperparameters.uniform(model.groups, 1.0)),
        (space.anchor(), Hyperparameters.uniform(model.groups, math.inf)),
    ):
        one, two = model.merge(there), plain.merge(bare)
        assert all(torch.equal(one[n], two[n]) for n in two)
    assert space.anchor() == Hyperparameters.uniform(model.groups, math.inf)
    exact = model.merge(space.anchor())
    assert all(torch.equal(exact[n], anchor[n]) for n in exact)


def test_the_anchors_scale_is_that_of_an_anchor_with_another_scale(run, grams):
    """For a method with a linear knob; in every tensor, solved or not."""
    scale = 0.5
    one = prepared(run, run.anchor("task_arithmetic", {"scale": 0.4}), grams, search=["anchor_scale"])
    two = prepared(run, run.anchor("task_arithmetic", {"scale": 0.4 * scale}), grams, search=())
    for lam in (0.1, math.inf):
        assert_close(one.merge(point(one, lam, anchor_scale=scale)), two.merge(point(two, lam)))
    base = {n: run.pool.base[n].float() for n in run.pool.names}
    assert_close(one.merge(point(one, math.inf, 1.0, anchor_scale=0.0)), base)


def test_one_factor_serves_all_modules_that_read_an_input(run, anchor, grams, monkeypatch):
    model = prepared(run, anchor, grams)
    calls = []
    cholesky = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda m: calls.append(m.shape) or cholesky(m))
    model.merge(point(model, weights={"ring": 2.0}))
    assert len(calls) == len({id(s.evidence.source) for s in model.slots if s.layout != "norm"})
    assert len(calls) < len([s for s in model.slots if s.layout != "norm"])
    calls.clear()
    model.merge(point(model))
    assert calls == []


def test_rounding_is_no_evidence_in_a_float32_gram():
    """Where lam is within a million times the Gram's noise, no Cholesky factor is used."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    gram = x.T @ x
    source = InputGrams(((gram,),), "trace", "m")
    like = torch.zeros(1, dtype=torch.float64)
    trial = Pooled(Mix((1.0,), 0.0))
    _, noise = trial.pooled(source, like)
    assert noise > 1e-7
    assert trial.factor(source, 0.9 * SAFE_RATIO * noise, like) is None
    assert trial.factor(source, 1.1 * SAFE_RATIO * noise, like) is not None


@pytest.mark.parametrize(
    ("search", "extras", "said"),
    [
        ((), {"weights": {"ring": 2.0}}, "not prepared for other task weights"),
        ((), {"anchor_scale": 0.5}, "not prepared for another anchor_scale"),
        (("weights",), {"anchor_scale": 0.5}, "not prepared for another anchor_scale"),
        (("weights",), {"weights": {"rin": 2.0}}, "unknown task 'rin'"),
        (("weights",), {"gamma": 0.5}, "gamma with data Grams"),
    ],
)
def test_points_the_model_is_not_prepared_for_are_refused(run, anchor, grams, search, extras, said):
    model = prepared(run, anchor, grams, search=search)
    with pytest.raises(RecipeError, match=said):
        model.merge(point(model, **extras))


def test_space_names_bounds_and_round_trip():
    weights = {"a": 1.0, "b": 0.5, "off": 0.0}
    space = Space.for_groups(["g"]).extended(0.25, weights, 1.0)
    by_name = {p.name: p for p in space.parameters}
    assert list(by_name) == ["log10_lam/g", "rho/g", "gamma", "log10_weight/a", "log10_weight/b", "anchor_scale"]
    assert (by_name["gamma"].low, by_name["gamma"].high, by_name["gamma"].default) == (0, 1, 0.25)
    assert 10 ** by_name["log10_weight/b"].low == pytest.approx(0.125)
    assert 10 ** by_name["log10_weight/b"].high == pytest.approx(2)
    assert by_name["anchor_scale"].default == 1
    assert space.groups == ["g"]
    assert space.tasks == ["a", "b"]
    assert Space.from_json(json.loads(json.dumps(space.to_json()))) == space
    found = space.to_hyperparameters(space.from_unit(np.array([0.5, 0.5, 0.1, 1.0, 0.0, 0.75])))
    assert (found.gamma, found.anchor_scale) == (pytest.approx(0.1), pytest.approx(1.5))
    assert found.weights == {"a": pytest.approx(4), "b": pytest.approx(0.125)}
    np.testing.assert_allclose(space.to_unit(space.point_of(found)), [0.5, 0.5, 0.1, 1.0, 0.0, 0.75], atol=1e-12)
    for values in (space.point_of(space.anchor()), space.point_of(space.default())):
        assert {n: values[n] for n in ("gamma", "anchor_scale")} == {"gamma": 0.25, "anchor_scale": 1.0}
    assert Space.for_groups(["g"]).extended() == Space.for_groups(["g"])


def test_hyperparameters_survive_json_and_old_ones_load():
    full = Hyperparameters({"g": math.inf}, {"g": 1.0}, 0.25, {"a": 2.0}, 0.5)
    assert Hyperparameters.from_json(json.loads(json.dumps(full.to_json(), allow_nan=False))) == full
    old = {"lam": {"g": "inf"}, "rho": {"g": 1.0}}
    assert Hyperparameters.from_json(old).to_json() == old
    trial = Trial(3, "search", "completed", full, {"a": 0.5}, 0.5)
    assert Trial.from_json(json.loads(json.dumps(trial.to_json()))) == trial
    table = hyperparameter_table(full)
    assert "gamma 0.250; anchor scale 0.500; task weights a 2" in table
    assert "gamma" not in hyperparameter_table(Hyperparameters.from_json(old))


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"search": ["weigths"]}, "weigths"),
        ({"search": ["gamma"], "grams": "data"}, "grams is data"),
        ({"search": "weights"}, "a list"),
        ({"bias": "none"}, "no bias"),
    ],
)
def test_recipes_that_search_nonsense_are_refused(raw, said):
    with pytest.raises(RecipeError, match=said):
        Recipe.from_dict(raw)


def test_flags_reach_the_recipe():
    given = {
        "search": ("weights", "anchor_scale", "weights"),
        "norms": "regression",
        "inputs": "merged",
        "bias": "anchor",
    }
    recipe = load_recipe(None, given)
    assert recipe.search == ("weights", "anchor_scale")
    assert (recipe.norms, recipe.inputs, recipe.bias) == ("regression", "merged", "anchor")
    done = CliRunner().invoke(tune_command, ["--search", "weigths"])
    assert done.exit_code == 2
    assert "weights" in done.output


def test_a_bias_that_keeps_the_anchor(run, anchor, grams):
    model = prepared(run, anchor, grams, bias="anchor", search=())
    merged = model.merge(point(model, 0.1))
    assert torch.equal(merged["fc1.bias"], anchor["fc1.bias"])
    joined = prepared(run, anchor, grams, search=()).merge(point(model, 0.1))
    assert not torch.equal(joined["fc1.bias"], anchor["fc1.bias"])
    w0, wa = run.pool.base["fc1.weight"].double(), anchor["fc1.weight"].double()
    top, bottom = 0.1 * wa, 0.1 * torch.eye(24).double()
    for task, expert in zip(grams, run.pool.experts, strict=True):
        gram = task.for_weight("fc1.weight").double()[:-1, :-1]
        gram = gram * 24 / gram.trace()
        top, bottom = top + expert["fc1.weight"].double() @ gram, bottom + gram
    expected = w0 + 1.1 * (torch.linalg.solve(bottom, top.T).T - w0)
    assert (merged["fc1.weight"] - expected).norm() <= 1e-5 * expected.norm()


def test_a_study_with_every_extra(family, tmp_path):
    keys = family.recipe(
        anchor="task_arithmetic", grams="hybrid", search=list(EVERYTHING), norms="regression",
        engine="sobol", budget=5, out=str(tmp_path / "run"),
    )  # fmt: skip
    result = bmm.tune(keys)
    assert [t.status for t in result.trials] == ["completed"] * 5
    found = result.trials[3].hyperparameters
    assert set(found.weights) == set(TASKS)
    assert found.gamma not in (None, 0.5)
    assert found.anchor_scale not in (None, 1.0)
    assert "gamma" not in result.trials[0].hyperparameters.to_json()
    merged = bmm.merge(study=tmp_path / "run", trial=3)
    scores = {s.task: s.value for s in bmm.evaluate(merged, keys, split="validation")}
    assert scores == pytest.approx(result.trials[3].scores)
    path = bmm.merge(study=tmp_path / "run", trial=3, out=tmp_path / "model")
    card = (path / "README.md").read_text()
    assert all(word in card for word in ("gamma", "weights", "anchor_scale"))
    again = bmm.tune(resume=tmp_path / "run", budget=6)
    assert again.trials[:5] == result.trials
    assert again.best.number > 0
    assert "task weights" in (tmp_path / "run" / "report.md").read_text()
    assert "task weights" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_the_engine_takes_the_extras(family, tmp_path):
    keys = family.recipe(
        anchor="task_arithmetic", search=["weights"], groups="global", budget=8, out=str(tmp_path / "r")
    )
    result = bmm.tune(keys)
    assert result.trials[7].kind == "search"
    assert all(0.25 <= w <= 4 for w in result.trials[7].hyperparameters.weights.values())
