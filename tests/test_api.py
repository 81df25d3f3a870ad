"""bmm.tune, merge, evaluate, collect_grams and load_study on a real small family."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bmm
from bmm.errors import CheckpointError, MergeError, RecipeError, StudyError, WriteError
from tests.family import TASKS


def test_tuning_gives_scores_paths_and_a_model_that_scores_the_same(study, family):
    assert len(study.trials) == 8
    assert [t.kind for t in study.trials[:3]] == ["anchor", "default", "search"]
    assert study.best.objective >= study.trials[0].objective
    assert set(study.test) == {"base", "anchor", "default", "best", "experts"}
    again = bmm.evaluate(study.paths["checkpoint"], family.recipe())
    assert again == study.test["best"]
    assert study.mean("experts") > study.mean("best") > study.mean("base")


def test_trial_zero_is_the_anchor_itself(study, family):
    anchor = bmm.merge(family.recipe(), anchor="task_arithmetic")
    assert bmm.evaluate(anchor, family.recipe()) == study.test["anchor"]
    assert all(math.isinf(v) for v in study.trials[0].hyperparameters.lam.values())


def test_checkpoint_is_complete_and_reproducible(study):
    folder = Path(study.paths["checkpoint"])
    card = (folder / "README.md").read_text()
    assert "task_arithmetic" in card
    assert "torch" in card
    recipe = bmm.Recipe.load(folder / "bmm_recipe.yaml")
    assert recipe.to_dict() == study.recipe
    again = bmm.merge(study=study.paths["study"])
    written = load_file(folder / "model.safetensors")
    assert all(torch.equal(written[n], again[n]) for n in written)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "family"


def test_load_study_equals_what_tune_returned(study):
    assert bmm.load_study(study.paths["study"]) == study


def test_same_seed_same_study(study, family, tmp_path):
    other = bmm.tune(family.recipe(), anchor="task_arithmetic", engine="sobol", budget=8, out=str(tmp_path / "again"))
    for a, b in zip(study.trials, other.trials, strict=True):
        assert (a.hyperparameters, a.scores, a.objective) == (b.hyperparameters, b.scores, b.objective)


def test_resume_with_a_larger_budget(family, tmp_path):
    keys = family.recipe(engine="sobol", anchor="average")
    short = bmm.tune(keys, budget=4, out=str(tmp_path / "a"))
    long = bmm.tune(resume=tmp_path / "a", budget=7)
    whole = bmm.tune(keys, budget=7, out=str(tmp_path / "b"))
    assert [t.hyperparameters for t in long.trials] == [t.hyperparameters for t in whole.trials]
    assert [t.objective for t in long.trials] == [t.objective for t in whole.trials]
    assert len(short.trials) == 4
    assert bmm.load_study(tmp_path / "a") == long


def test_stopping_early_keeps_what_was_found(family, tmp_path):
    seen = []
    result = bmm.tune(
        family.recipe(engine="sobol"), budget=50, out=str(tmp_path / "s"), on_trial=lambda t, best: seen.append(t),
        should_stop=lambda: len(seen) >= 3,
    )  # fmt: skip
    assert len(result.trials) == 3
    assert (tmp_path / "s" / "model" / "model.safetensors").exists()


def test_places_that_cannot_be_written_are_refused_before_any_work(study, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for module in ("bmm.tuning.Run", "bmm.opening.Run"):
        monkeypatch.setattr(module, lambda *a, **k: pytest.fail("opened the models"))
    keys = {k: v for k, v in study.recipe.items() if k != "out"}
    for out in ("file", "file/x"):
        with pytest.raises(WriteError, match=r"cannot be written \(.*file is a file\)"):
            bmm.tune(keys, out=str(tmp_path / out))
    for target in ({"lam": 1.0}, {}):
        with pytest.raises(WriteError, match="not empty") as error:
            bmm.merge(keys, out=tmp_path / "full", **target)
        assert "--overwrite" in error.value.hint
    with pytest.raises(WriteError, match="not empty"):
        bmm.save(study.paths["study"], out=tmp_path / "full")
    with pytest.raises(MergeError, match="lam is -1"):
        bmm.merge(keys, lam={"g": -1.0})


def test_occupied_folder_is_refused(study):
    with pytest.raises(StudyError, match="already holds a study"):
        bmm.tune(study.recipe)
    with pytest.raises(StudyError, match="no study"):
        bmm.tune(resume="/no/such/folder")


def test_live_tasks_and_model_in_place_of_files(family, tmp_path):
    from bmm.functions import load_function

    tasks, model = load_function(f"{family.file}:tasks", "t")(), load_function(f"{family.file}:model", "m")
    result = bmm.tune(
        base=str(family.base), experts=family.experts, tasks=tasks, model=model, engine="sobol", budget=3,
        out=str(tmp_path / "r"),
    )  # fmt: skip
    assert {s.task for s in result.test["best"]} == set(TASKS)


@pytest.mark.parametrize("anchor", ["average", "ties", "tsv", "regmean"])
def test_plain_merges_on_disk_equal_those_in_memory(anchor, family, tmp_path):
    path = bmm.merge(family.recipe(), anchor=anchor, out=tmp_path / "m")
    merged = bmm.merge(family.recipe(), anchor=anchor)
    written = load_file(path / "model.safetensors")
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-7)
    assert written["steps"].dtype == torch.int64


def test_merge_at_given_hyperparameters_and_from_a_path(family, tmp_path):
    plain = bmm.merge(family.recipe(), anchor="tsv", out=tmp_path / "anchor")
    by_path = bmm.merge(family.recipe(), anchor=f"path:{plain}", lam=0.5, rho=0.9)
    by_name = bmm.merge(family.recipe(), anchor="tsv", lam=0.5, rho=0.9)
    for name in by_name:
        torch.testing.assert_close(by_path[name], by_name[name], rtol=1e-5, atol=1e-6)
    per_group = dict.fromkeys(("conv", "q", "k", "fc1", "out"), 0.5)
    assert torch.equal(
        bmm.merge(family.recipe(), anchor="tsv", lam=per_group, rho=0.9)["q.weight"], by_name["q.weight"]
    )
    with pytest.raises(RecipeError, match="exactly the groups"):
        bmm.merge(family.recipe(), anchor="tsv", lam={"q": 1.0})


def test_existing_output_is_not_overwritten_unasked(family, tmp_path):
    bmm.merge(family.recipe(), anchor="average", out=tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    with pytest.raises(WriteError):
        bmm.merge(family.recipe(), anchor="ties", out=tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    bmm.merge(family.recipe(), anchor="ties", out=tmp_path / "m", overwrite=True)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() != before


def test_grams_are_cached_and_a_damaged_cache_is_rebuilt(family, tmp_path):
    keys = family.recipe(cache=str(tmp_path))
    first = bmm.collect_grams(keys)
    files = sorted((tmp_path / "grams").iterdir())
    assert len(files) == len(TASKS)
    stamps = [f.stat().st_mtime_ns for f in files]
    bmm.collect_grams(keys)
    assert [f.stat().st_mtime_ns for f in files] == stamps
    raw = bytearray(files[0].read_bytes())
    raw[-5] ^= 0xFF
    files[0].write_bytes(raw)
    again = bmm.collect_grams(keys)
    for task in TASKS:
        for key, gram in first[task].grams.items():
            assert torch.equal(again[task].grams[key], gram)
    assert files[0].read_bytes() != bytes(raw)


def test_mistakes_in_input_stop_before_work(family, tmp_path):
    keys = family.recipe()
    keys["experts"] = {**family.experts, "corner": str(tmp_path / "none")}
    with pytest.raises(CheckpointError, match="none"):
        bmm.tune(keys, out=str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()
    keys = family.recipe(weights={"rings": 2.0})
    with pytest.raises(RecipeError, match="unknown tasks rings"):
        bmm.tune(keys, out=str(tmp_path / "x"))
    with pytest.raises(RecipeError, match="no split"):
        bmm.evaluate(family.base, family.recipe(), split="train")
    with pytest.raises(RecipeError, match="no device"):
        bmm.merge(family.recipe(), device="gpu0")


def test_a_resumed_study_keeps_its_recipe_and_its_inputs(family, tmp_path):

    copy = tmp_path / "models"
    shutil.copytree(family.folder, copy)
    keys = family.recipe(engine="sobol", experts={t: str(copy / t) for t in TASKS})
    bmm.tune(keys, budget=3, out=str(tmp_path / "r"))
    with pytest.raises(RecipeError, match="anchor cannot change"):
        bmm.tune(resume=tmp_path / "r", anchor="average")
    shutil.copy(copy / "ring" / "model.safetensors", copy / "corner" / "model.safetensors")
    with pytest.raises(StudyError, match="have changed"):
        bmm.tune(resume=tmp_path / "r", budget=5)


def test_relative_paths_survive_a_change_of_folder(family, tmp_path, monkeypatch):
    monkeypatch.chdir(family.folder)
    keys = family.recipe(engine="sobol", base="base", experts={t: t for t in TASKS}, tasks="tasks.py:tasks",
                         model="tasks.py:model")  # fmt: skip
    bmm.tune(keys, budget=3, out=str(tmp_path / "r"))
    monkeypatch.chdir(tmp_path)
    longer = bmm.tune(resume="r", budget=4)
    assert len(longer.trials) == 4
    again = bmm.tune(bmm.Recipe.load("r/model/bmm_recipe.yaml"), budget=4, out=str(tmp_path / "again"))
    assert [t.objective for t in again.trials] == [t.objective for t in longer.trials]


def test_a_plain_merge_needs_no_tasks(family):
    merged = bmm.merge(base=str(family.base), experts=family.experts, anchor="ties")
    assert set(merged) == set(load_file(family.base / "model.safetensors"))
    with pytest.raises(RecipeError, match="no tasks"):
        bmm.merge(base=str(family.base), experts=family.experts, anchor="ties", lam=1.0)


@pytest.mark.parametrize("anchor", ["task_arithmetic", "ties", "tsv"])
def test_a_plain_merge_names_the_checkpoint_with_bad_numbers_and_leaves_nothing(anchor, family, tmp_path):
    """Weights are checked as they are merged, not in a pass before; message and outcome are the same."""
    broken = load_file(Path(family.experts[TASKS[1]]) / "model.safetensors")
    name = sorted(n for n, w in broken.items() if w.is_floating_point())[-1]
    broken[name].view(-1)[0] = float("nan")
    (tmp_path / "broken").mkdir()
    save_file(broken, tmp_path / "broken" / "model.safetensors")
    experts = family.experts | {TASKS[1]: str(tmp_path / "broken")}
    with pytest.raises(CheckpointError, match=rf"expert '{TASKS[1]}' .*'{re.escape(name)}' holds 1 NaN"):
        bmm.merge(base=str(family.base), experts=experts, anchor=anchor, out=tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_automatic_groups_are_kept_when_the_budget_grows(family, tmp_path):
    keys = family.recipe(engine="sobol", anchor="average", groups="auto")
    first = bmm.tune(keys, budget=20, out=str(tmp_path / "run"))
    assert first.recipe["groups"] != "auto"
    groups = first.best.hyperparameters.lam.keys()
    assert 2 * len(groups) <= 20 // 3
    longer = bmm.tune(resume=tmp_path / "run", budget=24)
    assert len(longer.trials) == 24
    assert longer.best.hyperparameters.lam.keys() == groups


def test_early_stopping_from_end_to_end(family, tmp_path):
    keys = family.recipe(engine="sobol", anchor="average")
    whole = bmm.tune(keys, budget=16, out=str(tmp_path / "whole"))
    quick = bmm.tune(keys, budget=16, early_stopping=0.3, out=str(tmp_path / "quick"))
    stopped = [t for t in quick.trials if t.status == "stopped"]
    assert stopped
    for trial in stopped:
        assert trial.scores.items() < whole.trials[trial.number].scores.items()
    report = (tmp_path / "quick" / "report.md").read_text()
    assert f"{len(stopped)} stopped early" in report


def test_a_dtype_that_is_asked_for_is_the_only_rounding(tmp_path):
    values = {"base": [1.0, 1.0], "a": [1.0, 1.0078125], "b": [1.0, 1.0]}  # their mean is no bfloat16
    for name, value in values.items():
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor(value, dtype=torch.bfloat16)}, tmp_path / name / "model.safetensors")
    given = {"base": str(tmp_path / "base"), "experts": {n: str(tmp_path / n) for n in "ab"}, "anchor": "average"}
    for dtype, last in (("float32", 1.00390625), ("float16", 1.00390625), ("same", 1.0)):
        out = bmm.merge(given, out=tmp_path / dtype, dtype=dtype)
        assert load_file(out / "model.safetensors")["w"].tolist() == [1.0, last]
