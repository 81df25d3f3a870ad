"""Tuning without labels: scored by agreement, on the family, from end to end."""

import contextlib
import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bmm
from bmm.errors import RecipeError, StudyError
from bmm.functions import load_function
from bmm.recipe import Recipe
from bmm.report import text_report
from bmm.run import Run
from bmm.search.database import StudyDatabase
from bmm.search.space import Space
from bmm.search.study import run_study
from bmm.tuning import load_result
from tests.family import TASKS


@pytest.fixture(scope="module")
def unlabelled(family):
    return [replace(task, validation=task.validation[0]) for task in load_function(f"{family.file}:tasks", "t")()]


@pytest.fixture(scope="module")
def keys(family):
    given = family.recipe(engine="sobol", anchor="task_arithmetic", score_by="agreement")
    return {k: v for k, v in given.items() if k != "tasks"}


@pytest.fixture(scope="module")
def whole(keys, unlabelled, tmp_path_factory):
    return bmm.tune(keys, tasks=unlabelled, budget=6, out=str(tmp_path_factory.mktemp("labelfree") / "run"))


def test_a_study_without_labels(whole, family):
    assert [s.value for s in whole.validation["experts"]] == [1.0] * len(TASKS)
    for trial in whole.trials:
        assert all(0 < v < 1 for v in trial.scores.values())
        assert trial.objective == pytest.approx(sum(trial.scores.values()) / len(TASKS))
    assert whole.best.objective >= whole.trials[0].objective
    assert len({t.objective for t in whole.trials}) > 1
    accuracies = bmm.evaluate(whole.paths["checkpoint"], family.recipe())
    assert whole.test["best"] == accuracies
    assert whole.mean("best") > whole.mean("base")


def test_what_it_writes_says_what_the_scores_are(whole):
    report = Path(whole.paths["report"]).read_text()
    assert "## Validation agreement with the experts (%)" in report
    assert "## Test accuracy (%)" in report
    assert "## Test accuracy (%)" in Path(whole.paths["card"]).read_text()
    assert bmm.Recipe.load(Path(whole.paths["checkpoint"]) / "bmm_recipe.yaml").score_by == "agreement"


def test_resuming_goes_on_with_the_same_trials(whole, keys, unlabelled, tmp_path):
    bmm.tune(keys, tasks=unlabelled, budget=3, out=str(tmp_path / "r"))
    long = bmm.tune(resume=tmp_path / "r", tasks=unlabelled, budget=6)
    assert [(t.hyperparameters, t.scores) for t in long.trials] == [(t.hyperparameters, t.scores) for t in whole.trials]
    assert long.test == whole.test


def rename_back(folder):
    """Makes a study's files those of a version that called ``score_by`` ``objective``."""
    with contextlib.closing(sqlite3.connect(folder / "study.db")) as rows, rows:
        for key in ("recipe", "search"):
            (text,) = rows.execute("SELECT value FROM meta WHERE key = ?", [key]).fetchone()
            rows.execute("UPDATE meta SET value = ? WHERE key = ?", [text.replace('"score_by"', '"objective"'), key])
    if (folder / "result.json").exists():
        raw = json.loads((folder / "result.json").read_text())
        raw["recipe"]["objective"] = raw["recipe"].pop("score_by")
        (folder / "result.json").write_text(json.dumps(raw))


def test_a_study_from_before_the_key_was_renamed_opens_resumes_and_reports(whole, keys, unlabelled, tmp_path):
    bmm.tune(keys, tasks=unlabelled, budget=3, out=str(tmp_path / "r"))
    rename_back(tmp_path / "r")
    assert "agreement with the experts" in text_report(load_result(tmp_path / "r"))
    (tmp_path / "r" / "result.json").unlink()
    assert "agreement with the experts" in text_report(load_result(tmp_path / "r"))
    long = bmm.tune(resume=tmp_path / "r", tasks=unlabelled, budget=6)
    assert [(t.hyperparameters, t.scores) for t in long.trials] == [(t.hyperparameters, t.scores) for t in whole.trials]
    rename_back(tmp_path / "r")
    merged = bmm.merge(study=tmp_path / "r", trial=0, tasks=unlabelled)
    assert all(torch.isfinite(t).all() for t in merged.values())


def test_labels_beside_the_inputs_change_nothing(whole, family, tmp_path):
    keys = family.recipe(engine="sobol", anchor="task_arithmetic", score_by="agreement")
    other = bmm.tune(keys, budget=3, out=str(tmp_path / "r"))
    assert [t.scores for t in other.trials] == [t.scores for t in whole.trials[:3]]


def test_soups_are_picked_by_agreement_too(keys, unlabelled):
    run = Run(Recipe.from_dict(keys | {"anchor": "greedy_soup"}), tasks=unlabelled)
    tensors = {n: run.pool.experts[0][n] for n in run.pool.names}
    scores = run.score(tensors)
    assert scores[0].value == 1.0
    assert run.objective()(tensors) == pytest.approx(sum(s.value for s in scores) / len(TASKS))
    run.anchor()


def test_labels_are_asked_for_where_the_objective_needs_them(keys, unlabelled, tmp_path):
    with pytest.raises(RecipeError, match="have no labels") as error:
        bmm.tune(keys, score_by="labels", tasks=unlabelled, out=str(tmp_path / "r"))
    assert "score_by: agreement" in error.value.hint
    with pytest.raises(RecipeError, match="no score_by 'agrement'") as error:
        Recipe.from_dict({"score_by": "agrement"})
    assert "agreement" in error.value.hint
    assert not (tmp_path / "r").exists()


def test_outputs_without_probabilities_stop_a_study_before_it_begins(keys, unlabelled, tmp_path):
    broken = [replace(t, forward=lambda m, x: m(x)[:, :1]) for t in unlabelled]
    with pytest.raises(RecipeError, match="task 'ring' has no class probabilities"):
        bmm.tune(keys, tasks=broken, grams="datafree", out=str(tmp_path / "r"))
    assert not (tmp_path / "r").exists()


def test_a_study_holds_one_kind_of_scores(tmp_path):
    def run(path, **objective):
        opened = StudyDatabase.open(path) if path.exists() else StudyDatabase.create(path, {})
        with opened as database:
            space = Space.for_groups(["g"], (-1.0, 1.0), (0.5, 1.5))
            trials = run_study(
                database, space, lambda point: {"a": 0.5}, reference={"a": 1.0}, budget=2 + len(database.trials()),
                seed=0, engine="sobol", **objective,
            )  # fmt: skip
            return len(trials), database.meta()["search"]

    assert run(tmp_path / "a.db", score_by="agreement")[1]["score_by"] == "agreement"
    with pytest.raises(StudyError, match="another score_by: agreement there, labels here"):
        run(tmp_path / "a.db")
    assert run(tmp_path / "b.db")[1]["score_by"] == "labels"
    with StudyDatabase.open(tmp_path / "b.db") as database:  # as one from before there was a choice
        database.set_meta("search", {k: v for k, v in database.meta()["search"].items() if k != "score_by"})
    assert run(tmp_path / "b.db")[0] == 4
    with pytest.raises(StudyError, match="another score_by: labels there, agreement here"):
        run(tmp_path / "b.db", score_by="agreement")
