"""Merges module by module: the same as prepared ones, resumable, and with Grams collected in parts."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import bmm
import bmm.streamed
from bmm.checkpoint import Checkpoint, ModelPool, open_checkpoint, write_checkpoint
from bmm.checkpoint.staging import AHEAD
from bmm.errors import GramError, RecipeError, WriteError
from bmm.grams import gram_bytes, in_parts
from bmm.memory import estimate
from bmm.recipe import Recipe
from bmm.records import Hyperparameters
from bmm.run import Run
from bmm.writing import streamed_merge

RECIPES = {
    "data": {},
    "datafree": {"grams": "datafree"},
    "hybrid": {"grams": "hybrid", "gamma": 0.3},
    "norms": {"norms": "regression"},
    "plain biases": {"bias": "anchor"},
    "merged inputs": {"inputs": "merged"},
    "weighted": {"weights": {"ring": 2.0, "corner": 0.0}, "normalise": "none"},
    "statistics in the anchor": {"anchor": "regmean", "grams": "datafree"},
}


@pytest.fixture(scope="module", params=RECIPES)
def run(family, request):
    given = family.recipe(anchor="task_arithmetic", grams="data", groups="module") | RECIPES[request.param]
    return Run(Recipe.from_dict(given))


@pytest.mark.parametrize(
    ("lam", "rho", "scale"), [(1.0, 0.8, None), (1e-3, 1.2, 0.5), (1e3, 0.0, None), (1e-13, 1.0, None), (0.0, 1.0, 2.0)]
)
def test_a_streamed_merge_is_the_prepared_one(run, lam, rho, scale):
    run.recipe = Recipe.from_dict(run.recipe.to_dict() | {"search": ["anchor_scale"]})
    prepared = run.prepare()
    streamed, anchor = streamed_merge(run)
    assert set(streamed.groups) == set(prepared.groups)
    lams = {group: lam * 2**k for k, group in enumerate(prepared.groups)}
    point = Hyperparameters(lams, dict.fromkeys(prepared.groups, rho), anchor_scale=scale)
    expected, found = prepared.merge(point), dict(streamed.at(point, anchor(())))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        # where lam is rounding's size both are exact to it, and no more
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6 if lam > 1e-6 else 1e-4, msg=name)


def test_infinite_lam_is_the_anchor_and_done_names_are_left_out(run):
    streamed, anchor = streamed_merge(run)
    point = Hyperparameters.uniform(streamed.groups, math.inf)
    whole = dict(streamed.at(point, anchor(())))
    for name, tensor in anchor(()):
        assert torch.equal(whole[name], tensor), name
    done = ["q.weight", "q.bias", "steps", "out.weight"]
    assert whole.keys() - dict(streamed.at(point, anchor(done), done)).keys() == set(done)


def test_searched_gamma_and_weights_are_merged_as_in_a_trial(family):
    keys = family.recipe(anchor="task_arithmetic", grams="hybrid", groups="global", search=["gamma", "weights"])
    run = Run(Recipe.from_dict(keys))
    point = Hyperparameters({"all": 0.1}, {"all": 1.1}, gamma=0.8, weights={"ring": 0.5, "stripe": 3.0})
    streamed, anchor = streamed_merge(run)
    expected, found = run.prepare().merge(point), dict(streamed.at(point, anchor(())))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_missing_groups_and_grams_are_named(run):
    streamed, anchor = streamed_merge(run)
    with pytest.raises(RecipeError, match="no hyperparameters for group"):
        dict(streamed.at(Hyperparameters({}, {}), anchor(())))
    with pytest.raises(GramError, match="needs activation Grams"):
        bmm.streamed.StreamedMerge(run.pool, None, source="data")


def test_a_merge_on_disk_is_the_merge_in_memory(family, tmp_path):
    keys = family.recipe(anchor="task_arithmetic", grams="data")
    expected = bmm.merge(keys, lam=0.5, rho=0.9)
    out = bmm.merge(keys, lam=0.5, rho=0.9, out=tmp_path / "out", shard_gib=2e-6)
    found = open_checkpoint(out)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    for name in found:
        assert torch.equal(found[name], expected[name].to(found[name].dtype)), name


# memory


def test_grams_collected_in_parts_are_those_collected_at_once(family, tmp_path):
    whole = bmm.collect_grams(family.recipe(cache=str(tmp_path / "one")))
    parts = bmm.collect_grams(family.recipe(cache=str(tmp_path / "parts")), max_memory=4.3e-4)
    files = len(list((tmp_path / "parts" / "grams").iterdir()))
    assert files > len(whole) == len(list((tmp_path / "one" / "grams").iterdir()))
    for task, grams in whole.items():
        assert parts[task].key_of.keys() == grams.key_of.keys()
        assert parts[task].bias_of == grams.bias_of
        for name in grams.key_of:
            assert torch.equal(parts[task].for_weight(name), grams.for_weight(name)), name
    merged = [
        bmm.merge(family.recipe(cache=str(tmp_path / c)), lam=1.0, max_memory=m)
        for c, m in (("one", 0), ("parts", 5.4e-4))
    ]
    assert all(torch.equal(merged[0][n], merged[1][n]) for n in merged[0])


def test_what_does_not_fit_is_refused_before_anything_is_read(family, monkeypatch):
    run = Run(Recipe.from_dict(family.recipe(anchor="task_arithmetic", grams="datafree")))
    for what in ("plain", "merge", "tune"):
        needed, where = estimate(run.recipe, run.pool, what)
        assert needed > 0
        assert where
    monkeypatch.setattr(ModelPool, "check_finite", lambda *a: None)
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda *a: pytest.fail("read a tensor"))
    keys = family.recipe(anchor="tsv", grams="datafree", max_memory=1e-6)
    with pytest.raises(RecipeError, match=r"needs about .* GiB for .*, and max_memory is 1e-06"):
        bmm.merge(keys)
    with pytest.raises(RecipeError, match="max_memory is 1e-06"):
        bmm.merge(keys, lam=1.0)
    with pytest.raises(RecipeError, match="modules prepared for trials"):
        bmm.tune(keys)


def test_the_estimate_of_a_streamed_merge_bounds_what_it_takes(tmp_path):
    shapes = {"a.weight": (2048, 1536), "b.weight": (1536, 3072)}
    for name in ("base", "e0", "e1", "e2"):
        save_file({n: torch.randn(s) for n, s in shapes.items()}, tmp_path / f"{name}.safetensors")
    recipe = {"base": str(tmp_path / "base.safetensors"), "anchor": "task_arithmetic", "grams": "datafree"}
    recipe["experts"] = {f"e{t}": str(tmp_path / f"e{t}.safetensors") for t in range(3)}
    run = Run(Recipe.from_dict(recipe), need_tasks=False)
    needed, _ = estimate(run.recipe, run.pool, "merge")
    code = """
import json, sys, torch, bmm, bmm.api, bmm.writing
def peak():  # ru_maxrss would start at that of the parent
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
torch.linalg.cholesky(torch.eye(8)); torch.eye(64) @ torch.eye(64)
before = peak()
bmm.merge(json.loads(sys.argv[1]), lam=1.0, out=sys.argv[2])
print(peak() - before)
"""
    out = subprocess.run(
        [sys.executable, "-c", code, json.dumps(recipe), str(tmp_path / "out")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    taken = int(out.stdout.splitlines()[-1])
    assert 0.5 * needed < taken < 1.1 * needed, taken / needed


def test_parts_hold_what_fits_and_every_name_once():
    sizes = {"a": 3, "b": 4, "c": 9, "d": 1, "e": 5}
    assert in_parts(sizes, 7) == [{"a", "b"}, {"c"}, {"d", "e"}]
    assert in_parts(sizes, 0) == [set(sizes)]
    assert gram_bytes(torch.nn.Linear(3, 2)) == {"weight": 8 * 4 * 4}


# taking up again


def tensors():
    return {f"t{k}": torch.full((40, 10), float(k)) for k in range(12)}


@pytest.fixture
def like(tmp_path):
    return open_checkpoint(write_checkpoint(tmp_path / "base", tensors()))


def partial(tmp_path):
    return list(tmp_path.glob(".out.incomplete-*"))


def stopped(tmp_path, like, after, key=7):
    """A write with shards of two tensors that stops after some; returns nothing."""

    def stream(done):
        for k, name in enumerate(n for n in like.names if n not in done):
            if k == after:
                raise KeyboardInterrupt
            yield name, like[name] + 1

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "out", stream, like=like, max_shard_bytes=3200, key=key)


def test_a_stopped_write_goes_on_from_its_finished_shards(tmp_path, like):
    stopped(tmp_path, like, 5)  # two shards are whole, the third is half there
    assert len(partial(tmp_path)) == 1
    asked = []

    def stream(done):
        assert len(done) == 4
        for name in like.names:
            if name not in done:
                asked.append(name)
                yield name, like[name] + 1

    out = write_checkpoint(tmp_path / "out", stream, like=like, max_shard_bytes=3200, key=7)
    assert len(asked) == len(like) - 4
    whole = write_checkpoint(tmp_path / "whole", {n: like[n] + 1 for n in like}, like=like, max_shard_bytes=3200)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert all((out / p.name).read_bytes() == p.read_bytes() for p in whole.iterdir())
    assert partial(tmp_path) == []


def test_other_keys_and_damaged_shards_are_not_taken_over(tmp_path, like):
    stopped(tmp_path, like, 5)
    stopped(tmp_path, like, 3, key=8)
    assert len(partial(tmp_path)) == 2
    [mine] = [p for p in partial(tmp_path) if p.name.endswith("-7")]
    first = sorted(mine.glob("*.finished"))[0]
    first.write_bytes(first.read_bytes()[:-1])
    seen = []
    write_checkpoint(
        tmp_path / "out",
        lambda done: seen.append(len(done)) or ((n, like[n]) for n in like.names if n not in done),
        like=like, max_shard_bytes=3200, key=7,
    )  # fmt: skip
    assert seen == [2]
    assert torch.equal(open_checkpoint(tmp_path / "out")[like.names[0]], like[like.names[0]])


def test_nothing_stays_of_a_write_without_a_finished_shard(tmp_path, like):
    stopped(tmp_path, like, 1)
    assert partial(tmp_path) == []


def test_two_processes_do_not_write_one_folder(tmp_path, like):
    def stream(done):
        with pytest.raises(WriteError, match="another process is writing it"):
            write_checkpoint(tmp_path / "out", tensors(), like=like, key=7)
        yield from tensors().items()

    assert write_checkpoint(tmp_path / "out", stream, like=like, key=7)


MERGE = "from bmm_cli.main import main; main()"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_merge_goes_on_from_its_finished_shards(family, tmp_path, how):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(family.recipe(anchor="task_arithmetic", grams="datafree", shard_gib=1e-6)))
    out = tmp_path / "out"
    command = [sys.executable, "-c", MERGE, "merge", "--recipe", str(recipe), "--lam", "1", "--out", str(out)]
    slow = "import bmm.streamed, time; kept = bmm.streamed.StreamedMerge._solved\n"
    slow += "def solved(*a):\n    print('module', flush=True); time.sleep(0.3); return kept(*a)\n"
    slow += "bmm.streamed.StreamedMerge._solved = solved\n"
    process = subprocess.Popen(
        [*command[:2], slow + MERGE, *command[3:]], stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
    )  # fmt: skip
    for _ in range(4):
        assert process.stdout.readline() == "module\n"
    os.kill(process.pid, how)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    assert any(folder.glob("*.finished") for folder in partial(tmp_path))
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "are there from an earlier start" in again.stderr
    assert partial(tmp_path) == []
    expected = bmm.merge(family.recipe(anchor="task_arithmetic", grams="datafree"), lam=1.0)
    found = open_checkpoint(out)
    assert all(torch.equal(found[n], expected[n].to(found[n].dtype)) for n in found)


@pytest.mark.parametrize("what", ["plain", "merge"])
def test_what_is_read_ahead_for_a_device_counts(run, what):
    on_device = Recipe.from_dict(run.recipe.to_dict() | {"device": "cuda:1"})
    more = estimate(on_device, run.pool, what)[0] - estimate(run.recipe, run.pool, what)[0]
    assert 2 * AHEAD < more < 3 * AHEAD  # the family is small: what waits, and little else
