"""Goals from end to end, and any trial of a study as a checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import bmm
from bmm.errors import RecipeError, StudyError, WriteError
from bmm.search.database import StudyDatabase
from tests.family import TASKS


def test_saving_the_best_trial_writes_the_model_that_tuning_wrote(study, tmp_path):
    path = bmm.save(study.paths["study"], out=tmp_path / "best")
    tuned = Path(study.paths["checkpoint"])
    assert (path / "model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()
    assert (path / "config.json").read_bytes() == (tuned / "config.json").read_bytes()
    card = (path / "README.md").read_text()
    assert f"--trial {study.best.number} --out best" in card
    assert "## Test accuracy (%)" in card
    recipe = bmm.Recipe.load(path / "bmm_recipe.yaml").to_dict()
    assert recipe | {"out": study.recipe["out"]} == study.recipe


def test_saving_another_trial_writes_what_it_was_scored_as(study, family, tmp_path):
    other = next(t for t in study.trials[2:] if t.number != study.best.number)
    path = bmm.save(Path(study.paths["study"]).parent, other.number, out=tmp_path / "other", dtype="float32")
    scores = bmm.evaluate(path, family.recipe(), split="validation")
    assert {s.task: s.value for s in scores} == other.scores
    card = (path / "README.md").read_text()
    assert f"Hyperparameters (trial {other.number})" in card
    assert "## Validation accuracy (%)" in card
    with pytest.raises(WriteError):
        bmm.save(study.paths["study"], other.number, out=path)


@pytest.mark.parametrize(
    ("trial", "keys", "said"),
    [(99, {}, "no trial 99"), (1, {"anchor": "ties"}, "anchor cannot change"), (1, {"budget": 9}, "budget cannot")],
)
def test_what_cannot_be_saved(study, tmp_path, trial, keys, said):
    with pytest.raises(RecipeError, match=said):
        bmm.save(study.paths["study"], trial, out=tmp_path / "m", **keys)
    assert not (tmp_path / "m").exists()


def test_a_failed_trial_and_changed_checkpoints_are_not_saved(family, tmp_path):
    folder = shutil.copytree(family.base.parent, tmp_path / "family")
    text = json.dumps(family.recipe(engine="sobol", anchor="average", grams="datafree"))
    keys = json.loads(text.replace(str(family.base.parent), str(folder)))
    bmm.tune(keys, budget=3, out=str(tmp_path / "run"))
    with StudyDatabase.open(tmp_path / "run" / "study.db") as database:
        database._connection.execute("UPDATE trials SET status = 'failed', error = 'OOM' WHERE number = 2")
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(RecipeError, match="trial 2 is failed: OOM"):
        bmm.save(tmp_path / "run", 2, out=tmp_path / "m")
    expert = folder / TASKS[0] / "model.safetensors"
    tensors = {n: t + 1 for n, t in load_file(expert).items()}
    expert.unlink()
    save_file(tensors, expert)
    with pytest.raises(StudyError, match="checkpoints have changed"):
        bmm.save(tmp_path / "run", 1, out=tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.fixture(scope="module")
def front(family, tmp_path_factory):
    out = tmp_path_factory.mktemp("front") / "run"
    return bmm.tune(
        family.recipe(engine="sobol", anchor="average", grams="datafree"), budget=7, out=str(out),
        objectives=f"{TASKS[0]},rest={TASKS[1]}+{TASKS[2]}", floor=0.2, goal="worst",
    )  # fmt: skip


def test_a_study_of_two_objectives_has_a_front(front):
    experts = {s.task: s.value for s in front.validation["experts"]}
    points = {}
    for t in front.trials:
        shares = {k: t.scores[k] / experts[k] for k in TASKS}
        points[t.number] = (shares[TASKS[0]], min(shares[TASKS[1]], shares[TASKS[2]]))
        assert front.objectives[t.number] == {TASKS[0]: points[t.number][0], "rest": points[t.number][1]}
        assert t.objective == pytest.approx(sum(points[t.number]) / 2)
    found = {t.number for t, _ in front.pareto()}
    kept = {n: p for n, p in points.items() if not front.violations[n]}
    for n, p in kept.items():
        beaten = any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in kept.values())
        assert beaten == (n not in found) or p in [kept[m] for m in found]
    assert found <= kept.keys()
    assert bmm.load_study(front.paths["study"]) == front
    (Path(front.paths["study"]).parent / "result.json").rename(Path(front.paths["study"]).parent / "aside.json")
    unfinished = bmm.load_study(front.paths["study"])
    assert (unfinished.goal, unfinished.objectives, unfinished.violations) == (
        front.goal, front.objectives, front.violations
    )  # fmt: skip
    assert unfinished.best == front.best
    (Path(front.paths["study"]).parent / "aside.json").rename(Path(front.paths["study"]).parent / "result.json")


def test_the_report_shows_the_front_and_the_figure_has_every_trial(front, study):
    text = Path(front.paths["report"]).read_text()
    assert "Pareto front" in text
    assert "floors: kept by trial" in text
    table = text.split("## Pareto front")[1].split("Save any")[0]
    assert table.count("\n|") == 2 + len(front.pareto())
    figure = bmm.pareto_figure(front)
    shown = [label.split()[1] for trace in figure.data for label in trace.text]
    assert sorted(map(int, shown)) == [t.number for t in front.trials]
    assert [len(trace.text) for trace in figure.data][1] == len(front.pareto())
    with pytest.raises(StudyError, match="one objective"):
        bmm.pareto_figure(study)
    assert "Pareto" not in Path(study.paths["report"]).read_text()


def test_floors_nobody_keeps_are_said_plainly(family, tmp_path):
    keys = family.recipe(engine="sobol", anchor="average", grams="datafree")
    result = bmm.tune(keys, budget=3, out=str(tmp_path / "r"), floor={"*": 1.5})
    assert "no trial keeps every floor" in Path(result.paths["report"]).read_text()
    assert result.violations[result.best.number] == min(result.violations.values())


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"goal": "wurst"}, "did you mean worst"),
        ({"floor": 1.6}, r"not in \(0, 1.5\]"),
        ({"floor": {"rong": 0.9}}, "did you mean ring"),
        ({"objectives": ["ring"]}, "one objective"),
        ({"objectives": "ring,ring"}, "two objectives are called ring"),
        ({"objectives": ["ring", "x=stripe+cornr"]}, "did you mean corner"),
        ({"objectives": ["ring", "corner"], "weights": {"ring": 0}}, "'ring': all of its tasks have weight 0"),
    ],
)
def test_goals_that_make_no_sense_are_refused_before_work(keys, said, family, tmp_path):
    with pytest.raises(RecipeError, match=said):
        bmm.tune(family.recipe(), **keys, out=str(tmp_path / "r"))
    assert not (tmp_path / "r").exists()
