"""Holdout, final race and refinement from end to end."""

import json
from pathlib import Path

import pytest

import bmm
from bmm.errors import RecipeError
from bmm.recipe import Recipe
from bmm.search.database import StudyDatabase

KEYS = {"anchor": "task_arithmetic", "engine": "sobol", "budget": 8, "holdout": 0.25, "finalists": 4}


def held_out(folder):
    with StudyDatabase.open(Path(folder) / "study.db") as database:
        return database.held_out()


def test_a_race_sees_the_inputs_that_the_search_did_not(family, tmp_path):
    result = bmm.tune(family.recipe(), **KEYS, out=str(tmp_path / "run"))
    assert {s.n for s in result.validation["best"]} == {120}
    choice = result.choice
    assert next(c.trial for c in choice.candidates if not c.dropped) == choice.trial == result.best.number
    kept = held_out(tmp_path / "run")
    assert len(kept) == choice.used
    assert {len(scores) for scores in kept.values()} == {40}
    whole = {s.task: s.value for s in bmm.evaluate(result.paths["checkpoint"], family.recipe(), split="validation")}
    for (number, task), scores in kept.items():
        if number == result.best.number:  # the two parts are the whole
            assert (120 * result.best.scores[task] + sum(scores)) / 160 == pytest.approx(whole[task])
    assert "## Final choice" in Path(result.paths["report"]).read_text()
    assert json.loads(Path(result.paths["result"]).read_text())["choice"]["trial"] == result.best.number
    assert "held out of the search" in Path(result.paths["card"]).read_text()


def test_a_race_that_was_interrupted_goes_on_where_it_was(family, tmp_path, monkeypatch):
    whole = bmm.tune(family.recipe(), **KEYS, out=str(tmp_path / "whole"))
    keep, counts = StudyDatabase.keep_held_out, []

    def counted(self, trial, scores):
        if len(counts) == 3:
            counts.append("interrupted")
            raise KeyboardInterrupt
        keep(self, trial, scores)
        counts.append((trial, *scores))

    monkeypatch.setattr(StudyDatabase, "keep_held_out", counted)
    with pytest.raises(KeyboardInterrupt):
        bmm.tune(family.recipe(), **KEYS, out=str(tmp_path / "cut"))
    assert not (tmp_path / "cut" / "result.json").exists()
    assert len(held_out(tmp_path / "cut")) == 3
    resumed = bmm.tune(resume=tmp_path / "cut")
    assert resumed.choice == whole.choice
    assert resumed.best.hyperparameters == whole.best.hyperparameters
    measured = [c for c in counts if c != "interrupted"]
    assert len(measured) == len(set(measured)) == whole.choice.used
    assert bmm.tune(resume=tmp_path / "cut").choice == whole.choice
    assert len([c for c in counts if c != "interrupted"]) == len(measured)  # nothing is measured twice


def test_without_labels_and_in_stages_by_the_mean_of_the_model(family, tmp_path):
    keys = KEYS | {"score_by": "agreement", "refine": True, "choice": "model", "budget": 10}
    result = bmm.tune(family.recipe(), **keys, out=str(tmp_path / "run"))
    assert result.choice.method == "model"
    assert result.choice.used > 0
    assert all(0 <= s <= 1 for scores in held_out(tmp_path / "run").values() for s in scores)
    with StudyDatabase.open(tmp_path / "run" / "study.db", readonly=True) as database:
        stages = database.meta()["search"]["refine"]
    assert [first for first, _ in stages] == [0, 2]
    assert set(stages[0][1].values()) == {"all"}
    assert set(stages[1][1]) == set(result.best.hyperparameters.lam)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"refine": True, "groups": "global"}, "refine needs groups to go to"),
        ({"finalists": 3}, "finalists are for a race"),
        ({"holdout": 0.6}, "holdout is 0.6, must be from 0 to 0.5"),
        ({"holdout": -0.1}, "holdout is -0.1"),
        ({"choice": "modell"}, "no choice 'modell'"),
        ({"finalists": 1, "holdout": 0.2}, "finalists is 1, must be at least 2"),
        ({"refine": "yes"}, "refine = 'yes' does not fit: true or false expected"),
    ],
)
def test_what_makes_no_sense_is_refused(keys, said):
    with pytest.raises(RecipeError, match=said.replace(".", r"\.")):
        Recipe.from_dict(keys)


def test_what_leaves_nothing_to_refine_or_to_score_is_refused_before_work_starts(family, tmp_path):
    auto = family.recipe(groups="auto", refine=True, engine="sobol", budget=6, out=str(tmp_path / "a"))
    with pytest.raises(RecipeError, match="nothing to refine: all modules share one group"):
        bmm.tune(auto)
    few = family.recipe(holdout=0.001, engine="sobol", budget=6, out=str(tmp_path / "b"))
    with pytest.raises(RecipeError, match="leaves a part empty"):
        bmm.tune(few)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
