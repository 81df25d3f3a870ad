"""Fishers of runs: their labels, their cache, and the methods that take them."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import bmm
import bmm.functions
from bmm.checkpoint import Checkpoint
from bmm.errors import RecipeError
from bmm.evaluation.task import categorical, draw_labels
from bmm.fisher import FisherStore
from bmm.recipe import Recipe
from bmm.run import Run
from bmm.statistics import Fishers
from tests.family import TASKS
from tests.fishers import assert_close, by_hand, inputs


def labels(family):
    """Labels for the family's calibration inputs; they need not be right."""
    return {t.name: torch.arange(len(t.calibration)) % 4 for t in tasks(family)}


def tasks(family):
    return bmm.functions.load_function(f"{family.file}:tasks", "tasks")()


def opened(family, folder, given=None, **keys):
    return Run(Recipe.from_dict(family.recipe(cache=str(folder), calibration=20, **keys)), tasks=given)


def test_labelled_calibration_comes_whole_or_in_batches():
    x, y = inputs(10), torch.arange(10)
    whole = bmm.Task("t", (x, y), calibration=x, calibration_targets=y)
    batches = bmm.Task("t", (x, y), calibration=[x[:4], x[4:]], calibration_targets=[y[:4], y[4:]])
    mixed = bmm.Task("t", (x, y), calibration=[x[:4], x[4:]], calibration_targets=y)
    for task in (whole, batches, mixed):
        found = list(task.labelled_calibration(7, 3))
        assert torch.equal(torch.cat([a for a, _ in found]), x[:7])
        assert torch.equal(torch.cat([b for _, b in found]), y[:7])
    for short in (replace(whole, calibration_targets=y[:8]), replace(batches, calibration_targets=[y[:4]])):
        with pytest.raises(RecipeError, match="calibration targets for a batch of"):
            list(short.labelled_calibration())


def test_true_labels_are_never_taken_from_elsewhere(family, tmp_path):
    with pytest.raises(RecipeError, match="no calibration targets") as error:
        opened(family, tmp_path, fisher="true").collect_fishers()
    assert "fisher: sampled" in error.value.hint
    assert not (tmp_path / "fisher").exists()


def test_a_likelihood_without_sampler_is_refused(family, tmp_path):
    own = [replace(t, log_likelihood=lambda out, y: categorical(out, y)) for t in tasks(family)]
    with pytest.raises(RecipeError, match="no way to sample") as error:
        opened(family, tmp_path, own).collect_fishers()
    assert "sample=function" in error.value.hint
    able = [replace(t, sample=lambda out, generator: draw_labels(out, generator)) for t in own]
    assert len(opened(family, tmp_path, able).collect_fishers()) == len(TASKS)


def test_true_and_sampled_fishers_of_a_run(family, tmp_path):
    known = labels(family)
    given = [replace(t, calibration_targets=known[t.name]) for t in tasks(family)]
    true = opened(family, tmp_path, given, fisher="true")
    found = true.collect_fishers()
    model = true.skeleton
    for fisher, task, expert in zip(found, true.tasks, true.pool.experts, strict=True):
        model.load_state_dict({n: expert[n] for n in expert})
        model.requires_grad_(True)
        expected = by_hand(model, task.calibration[:20], known[task.name][:20], task.forward)
        assert_close(dict(fisher), expected)
    sampled = opened(family, tmp_path).collect_fishers()
    assert set(sampled[0]) == set(found[0]) == {n for n, _ in model.named_parameters()}
    assert not torch.equal(sampled[0]["q.weight"], found[0]["q.weight"])


def stamps(folder):
    return {f.name: f.stat().st_mtime_ns for f in (folder / "fisher").iterdir()}


def test_fishers_are_cached_read_lazily_and_rebuilt_when_stale(family, tmp_path):
    first = opened(family, tmp_path)
    found, base = first.collect_fishers(), first.collect_base_fisher()
    assert all(isinstance(f, Checkpoint) for f in (*found, base))  # on disk, not in memory
    before = stamps(tmp_path)
    assert len(before) == len(TASKS) + 1
    notices = []

    def progress(stage, done, total, detail=""):
        if stage == "notice":
            notices.append(detail)

    again = opened(family, tmp_path)
    again.progress = progress
    assert all(torch.equal(a[n], b[n]) for a, b in zip(found, again.collect_fishers(), strict=True) for n in a)
    assert stamps(tmp_path) == before
    kept = {n: found[0][n] for n in found[0]}
    raw = bytearray(found[0].path.read_bytes())
    raw[-5] ^= 0x40
    found[0].path.write_bytes(raw)
    rebuilt = again.collect_fishers()[0]
    assert all(torch.equal(rebuilt[n], kept[n]) for n in kept)
    assert len(notices) == 1
    assert "Fisher cache" in notices[0]
    assert "rebuilding" in notices[0]
    for changed in ({"seed": 1}, {"batch_size": 7}, {"calibration": 19}):
        count = len(stamps(tmp_path))
        Run(Recipe.from_dict(family.recipe(cache=str(tmp_path), **({"calibration": 20} | changed)))).collect_fishers()
        assert (len(stamps(tmp_path)) > count) == ("batch_size" not in changed)


class Head:
    """A forward that is an object with its head in an attribute."""

    def __init__(self, head):
        self.head = head

    def __call__(self, net, x):
        return net(x) @ self.head.T


def apply_head(net, x, head):
    return net(x) @ head.T


def closed_over(head):
    return lambda net, x: net(x) @ head.T


@pytest.mark.parametrize("make", [lambda h: partial(apply_head, head=h), closed_over, Head], ids=str)
def test_a_changed_head_makes_the_cache_stale(family, tmp_path, make):
    def headed(scale):
        return [replace(t, forward=make(t.forward.__defaults__[0] * scale)) for t in tasks(family)]

    one = opened(family, tmp_path, headed(1.0)).collect_fishers()
    count = len(stamps(tmp_path))
    two = opened(family, tmp_path, headed(2.0)).collect_fishers()
    assert len(stamps(tmp_path)) == 2 * count
    assert not torch.equal(one[0]["q.weight"], two[0]["q.weight"])
    assert opened(family, tmp_path, headed(1.0)).collect_fishers()[0].path == one[0].path


def test_the_order_of_the_tasks_changes_no_fisher(family, tmp_path):
    run = opened(family, tmp_path)
    turned = opened(family, tmp_path / "other", experts=dict(reversed(family.experts.items())))
    forward_, backward = run.collect_fishers(), turned.collect_fishers()
    for a, b in zip(forward_, reversed(backward), strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)
    one, other = run.collect_base_fisher(), turned.collect_base_fisher()
    assert_close(dict(one), dict(other))
    assert one.path.name == other.path.name


def test_the_base_fisher_pools_the_tasks(family, tmp_path):
    run = opened(family, tmp_path)
    collector = Fishers(
        run.recipe, run.skeleton, run.pool.float_names, {}, FisherStore(tmp_path / "fisher"), run.device
    )
    each = [collector.of(run.pool.base, [task]) for task in run.tasks]
    pooled = run.collect_base_fisher()
    assert_close(dict(pooled), {n: sum(f[n] for f in each) / len(each) for n in pooled})


def test_a_cache_that_cannot_be_written_costs_memory_not_the_run(family, tmp_path):
    (tmp_path / "fisher").write_text("in the way")
    run = opened(family, tmp_path)
    assert isinstance(run.collect_fishers()[0], dict)
    (tmp_path / "fisher").unlink()
    kept = run.collect_fishers()[0]
    assert isinstance(kept, Checkpoint)
    assert FisherStore(tmp_path / "fisher").load("f1") is None


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", ["fisher", "gradient_matching", "mats"])
def test_merge_and_tune_end_to_end(family, tmp_path, anchor):
    keys = family.recipe(anchor=anchor, cache=str(tmp_path / "cache"), calibration=30, engine="sobol")
    plain = bmm.merge(keys)
    average = bmm.merge(keys, anchor="average")
    moved = max(float((plain[n].float() - average[n].float()).abs().max()) for n in plain)
    assert 1e-3 < moved < 10
    result = bmm.tune(keys, budget=3, out=str(tmp_path / "r"))
    assert len(result.trials) == 3
    anchored = {s.task: s.value for s in result.validation["anchor"]}
    run = Run(Recipe.from_dict(keys))
    assert anchored == {s.task: s.value for s in run.score(plain)}
    path = bmm.merge(keys, out=tmp_path / "m")
    assert {s.task: s.value for s in bmm.evaluate(path, keys, split="validation")} == anchored


def test_mats_takes_fishers_only_where_asked(family, tmp_path):
    keys = family.recipe(anchor="mats", cache=str(tmp_path), calibration=20)
    plain = bmm.merge(keys)
    assert not (tmp_path / "fisher").exists()
    asked = bmm.merge(keys, fisher="sampled")
    assert len(stamps(tmp_path)) == len(TASKS)
    assert not torch.equal(plain["norm.weight"], asked["norm.weight"])
    assert torch.equal(plain["q.weight"], asked["q.weight"])


def test_task_weights_enter_the_fisher_merge(family, tmp_path):
    keys = family.recipe(anchor="fisher", cache=str(tmp_path), calibration=20)
    alone = bmm.merge(keys, weights={"stripe": 0.0, "corner": 0.0})
    expert = bmm.checkpoint.open_checkpoint(family.experts["ring"])
    for name in alone:
        torch.testing.assert_close(alone[name].float(), expert[name].float(), rtol=1e-5, atol=1e-6)
