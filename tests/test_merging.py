"""The whole model prepared: exact limits and agreement with a dense float64 solve, module by module."""

import math

import pytest
import torch

from bmm.checkpoint import ModelPool
from bmm.errors import GramError, RecipeError
from bmm.merging import prepare_model
from bmm.recipe import Recipe
from bmm.records import Hyperparameters
from bmm.run import Run


@pytest.fixture(scope="module")
def run(family):
    return Run(Recipe.from_dict(family.recipe(anchor="task_arithmetic")))


@pytest.fixture(scope="module")
def grams(run):
    return run.collect_grams()


@pytest.mark.parametrize("source", ["data", "datafree", "hybrid"])
def test_infinite_lam_is_the_anchor_bit_for_bit(run, grams, source):
    anchor = run.anchor()
    prepared = prepare_model(run.pool, anchor, grams, source=source)
    merged = prepared.merge(Hyperparameters.uniform(prepared.groups, math.inf))
    assert set(merged) == set(run.pool.names)
    for name, tensor in merged.items():
        assert torch.equal(tensor, anchor[name]), name


@pytest.mark.parametrize("lam", [1e-3, 1.0, 1e3])
def test_modules_equal_a_dense_float64_solve(run, grams, lam):
    anchor = run.anchor()
    prepared = prepare_model(run.pool, anchor, grams, source="data", weights=[1.0, 0.5, 2.0])
    merged = prepared.merge(Hyperparameters.uniform(prepared.groups, lam, 0.9))

    def joined(tensors, module):
        weight = tensors[f"{module}.weight"].double().flatten(1)
        bias = tensors.get(f"{module}.bias")
        return weight if bias is None else torch.cat([weight, bias.double()[:, None]], 1)

    for module in ("conv", "q", "k", "fc1", "out"):
        w0, wa = joined(dict(run.pool.base), module), joined(anchor, module)
        top, bottom = lam * wa, lam * torch.eye(w0.shape[1], dtype=torch.float64)
        for weight, task, expert in zip([1.0, 0.5, 2.0], grams, run.pool.experts, strict=True):
            gram = task.for_weight(f"{module}.weight").double()
            gram = weight * gram * len(gram) / gram.trace()
            top, bottom = top + joined(dict(expert), module) @ gram, bottom + gram
        dense = w0 + 0.9 * (torch.linalg.solve(bottom, top.T).T - w0)
        got = joined(merged, module)
        assert (got - dense).norm() <= 1e-5 * dense.norm(), module


def test_modules_that_read_one_input_share_one_gram(grams):
    for task in grams:
        assert task.key_of["q.weight"] == task.key_of["k.weight"]
        assert len(task.grams) == len(task.key_of) - 1


def test_norms_and_buffers_keep_the_anchor(run, grams):
    anchor = run.anchor()
    prepared = prepare_model(run.pool, anchor, grams)
    merged = prepared.merge(Hyperparameters.uniform(prepared.groups, 0.1))
    for name in ("norm.weight", "norm.bias", "steps"):
        assert torch.equal(merged[name], anchor[name])


def test_order_of_experts_changes_nothing(run, grams):
    order = [2, 0, 1]
    pool = ModelPool(run.pool.base, [run.pool.experts[t] for t in order])
    anchor = run.anchor()
    a = prepare_model(run.pool, anchor, grams)
    b = prepare_model(pool, anchor, [grams[t] for t in order])
    point = Hyperparameters.uniform(a.groups, 0.3, 1.1)
    left, right = a.merge(point), b.merge(point)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-6)


def test_samples_scatter_around_the_mean(run, grams):
    prepared = prepare_model(run.pool, run.anchor(), grams)
    point = Hyperparameters.uniform(prepared.groups, 1.0)
    mean = prepared.merge(point)
    generator = torch.Generator().manual_seed(0)
    draws = [prepared.sample(point, 0.05, generator) for _ in range(64)]
    average = torch.stack([d["fc1.weight"] for d in draws]).mean(0)
    spread = torch.stack([d["fc1.weight"] for d in draws]).std(0)
    assert (average - mean["fc1.weight"]).abs().max() < 6 * spread.max() / 8
    assert torch.equal(draws[0]["norm.weight"], mean["norm.weight"])
    assert spread.min() > 0


def test_missing_group_or_grams_are_named(run, grams):
    prepared = prepare_model(run.pool, run.anchor(), grams)
    with pytest.raises(RecipeError, match="no hyperparameters for group"):
        prepared.merge(Hyperparameters({"conv": 1.0}, {"conv": 1.0}))
    with pytest.raises(GramError, match="needs activation Grams"):
        prepare_model(run.pool, run.anchor(), None, source="data")
    with pytest.raises(RecipeError, match="no Gram source"):
        prepare_model(run.pool, run.anchor(), grams, source="none")


def test_datafree_needs_no_tasks(family):
    keys = family.recipe(grams="datafree")
    keys.pop("tasks")
    keys.pop("model")
    run = Run(Recipe.from_dict(keys), need_tasks=False)
    prepared = run.prepare()
    assert set(prepared.groups) == {"conv", "q", "k", "fc1", "out"}
