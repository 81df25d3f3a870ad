"""Greedy soups: which experts enter, by which score, from Python, from a recipe and under BMM."""

import math

import pytest
import torch

import bmm
from bmm.anchors import merge
from bmm.checkpoint import open_checkpoint
from bmm.errors import MergeError, RecipeError
from bmm.run import Run

from .models import Lazy, family


def scalars(*values):
    return {"w": torch.zeros(1), "steps": torch.tensor(7)}, [
        {"w": torch.tensor([float(v)]), "steps": torch.tensor(t)} for t, v in enumerate(values)
    ]


def soup(values, target, **options):
    base, models = scalars(*values)
    calls = []

    def score(model):
        assert set(model) == {"w", "steps"}
        calls.append(float(model["w"]))
        return -abs(calls[-1] - target)

    return merge("greedy_soup", base, models, score=score, **options)["w"].item(), calls


def test_by_hand():
    # Target 1: 0.8 is best alone; 1.5 after it gives 1.15, which is better than 0.8; -1 then would give 0.43.
    got, calls = soup([-1.0, 1.5, 0.8], 1.0)
    assert got == pytest.approx(1.15)
    assert calls == pytest.approx([-1.0, 1.5, 0.8, 1.15, 1.3 / 3])


def test_an_ingredient_that_changes_nothing_is_added():
    got, _ = soup([2.0, 4.0], 3.0)  # both 1 away; their mean is better
    assert got == 3.0
    base, models = scalars(2.0, 4.0)
    assert merge("greedy_soup", base, models, score=lambda model: 0.0)["w"].item() == 3.0  # it does not fall


def test_against_an_independent_greedy_loop():
    base, models = family(7, seed=4, size=1.0)
    target = models[3]["linear.weight"].double() * 0.7 + models[5]["linear.weight"].double() * 0.4

    def score(model):
        return -float((model["linear.weight"].double() - target).square().sum())

    def mean(chosen):
        return {"linear.weight": sum(models[t]["linear.weight"].double() for t in chosen) / len(chosen)}

    order = sorted(range(7), key=lambda t: -score(mean([t])))
    chosen = order[:1]
    for t in order[1:]:
        if score(mean([*chosen, t])) >= score(mean(chosen)):
            chosen.append(t)
    assert 1 < len(chosen) < 7
    merged = merge("greedy_soup", base, models, score=score)
    for name in ("linear.weight", "norm.weight", "conv.weight"):
        expected = sum(models[t][name].double() for t in chosen) / len(chosen)
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(merged["steps"], base["steps"])


def test_weights_weigh_the_ingredients():
    got, calls = soup([0.0, 3.0], 1.0, weights=[2.0, 1.0])
    assert got == pytest.approx(1.0)
    assert calls[-1] == pytest.approx(1.0)


def test_equal_scores_do_not_depend_on_the_order_of_experts():
    """The second ingredient decides whether the third gets in, so an arbitrary order would show."""
    base, _ = scalars()
    values = [1.0, -1.0, 0.25, -0.25]

    def score(model):
        w = float(model["w"])
        return 1.0 if abs(w) in (1.0, 0.25) else 1.0 + (w > 0.1) - (w < -0.3)

    found = set()
    for shift in range(4):
        models = [{"w": torch.tensor([v]), "steps": torch.tensor(0)} for v in values[shift:] + values[:shift]]
        found.add(merge("greedy_soup", base, models, score=score)["w"].item())
    assert len(found) == 1


def test_scores_that_are_no_numbers_and_experts_that_do_not_fit_are_refused():
    base, models = family(2)
    with pytest.raises(MergeError, match=r"score of experts\[0\] is nan"):
        merge("greedy_soup", base, models, score=lambda model: math.nan)
    called = []
    broken = Lazy(models[1] | {"linear.weight": torch.ones(5, 6)})
    with pytest.raises(MergeError, match=r"linear.weight is float32 \(6, 5\) in the base"):
        merge("greedy_soup", base, [models[0], broken], score=called.append)
    assert called == []


def test_candidates_hold_tied_tensors_under_every_name():
    base, models = family(2)
    for model in (base, *models):
        model["head.weight"] = model["linear.weight"]
    seen = []
    merge("greedy_soup", base, models, score=lambda model: seen.append(set(model)) or 0.0)
    assert all(names == set(base) for names in seen)


def test_float64_bases_are_left_alone():
    base, models = family(2, dtype=torch.float64)
    before = {k: v.clone() for k, v in base.items()}
    merge("greedy_soup", base, models, score=lambda model: float(model["norm.weight"].sum()))
    assert all(torch.equal(base[k], before[k]) for k in base)


# -- through the tool --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(family):
    return bmm.merge(family.recipe(), anchor="greedy_soup", knobs={})


def test_the_score_of_a_recipe_is_the_objective_of_the_search(family):
    run = Run(bmm.Recipe.from_dict(family.recipe(weights={"ring": 3.0})))
    own = {s.task: s.value for s in run.score_experts()}
    base = {n: run.pool.base[n] for n in run.pool.names}
    scores = {s.task: s.value for s in run.score(base)}
    expected = sum(a * scores[t] / own[t] for t, a in (("ring", 3.0), ("stripe", 1.0), ("corner", 1.0))) / 5
    assert run.objective()(base) == pytest.approx(expected)


def test_a_soup_of_a_recipe_is_no_worse_than_its_best_ingredient(family, merged):
    run = Run(bmm.Recipe.from_dict(family.recipe()))
    score = run.objective()
    assert score(merged) >= max(score(expert) for expert in run.pool.experts)
    ingredients = [open_checkpoint(p) for p in family.experts.values()]
    means = [
        {n: sum(i[n].float() for i in some) / len(some) for n in ("q.weight", "out.weight")}
        for some in ([a] for a in ingredients)
    ] + [
        {n: sum(i[n].float() for i in some) / len(some) for n in ("q.weight", "out.weight")}
        for some in ([a, b] for k, a in enumerate(ingredients) for b in ingredients[:k])
    ] + [{n: sum(i[n].float() for i in ingredients) / 3 for n in ("q.weight", "out.weight")}]  # fmt: skip
    assert any(all(torch.allclose(merged[n], mean[n], atol=1e-6) for n in mean) for mean in means)


def test_a_soup_needs_tasks(family):
    keys = family.recipe()
    del keys["tasks"]
    with pytest.raises(RecipeError, match="no tasks") as error:
        bmm.merge(keys, anchor="greedy_soup")
    assert "tasks:" in error.value.hint


def test_bmm_around_a_soup_and_a_wrapped_method(family, merged, tmp_path):
    result = bmm.tune(family.recipe(), anchor="greedy_soup", engine="sobol", budget=2, out=str(tmp_path / "soup"))
    again = bmm.evaluate(merged, family.recipe())
    assert result.test["anchor"] == again
    path = bmm.merge(family.recipe(), anchor="tsv+lines", knobs={"lines_beta": 0.4}, out=tmp_path / "lines")
    assert "tsv+lines" in (path / "README.md").read_text()
    assert bmm.Recipe.load(path / "bmm_recipe.yaml").anchor == "tsv+lines"
    with pytest.raises(MergeError, match="has no knob 'lines_bet'"):
        bmm.merge(family.recipe(), anchor="tsv+lines", knobs={"lines_bet": 0.4})
