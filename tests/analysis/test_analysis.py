"""From rows to findings: signs, units, failed and pending trials, small studies, JSON, studies on disk."""

import json
from dataclasses import replace

import numpy as np
import pytest

import bmm
from bmm.analysis import Analysis, analyse_rows
from bmm.errors import StudyError
from bmm.search.study import best
from tests.analysis.studies import EXPERTS, GROUPS, killed_study, rows_at, sobol_points
from tests.search.problem import REFERENCE, SPACE
from tests.search.study_rows import rows_of

NAMES = [p.name for p in GROUPS.parameters]
MLP, PATCH = NAMES.index("rho/mlp"), NAMES.index("log10_lam/patch")
DEFAULT_LAM = 4 / 7  # log10 lam = 0 in [-4, 3]


def value(unit):
    """Best where rho of the MLPs is 1.4 (default 1) and lam of the patches at its default."""
    return 0.9 - 0.3 * (unit[MLP] - 0.9) ** 2 - 0.2 * (unit[PATCH] - DEFAULT_LAM) ** 2


@pytest.fixture(scope="module")
def study():
    return rows_at(GROUPS, sobol_points(60, len(GROUPS)), value)


@pytest.fixture(scope="module")
def analysis(study):
    return analyse_rows(study, GROUPS, EXPERTS)


def test_what_matters_comes_first(analysis):
    assert [i.parameter for i in analysis.importance[:2]] == ["rho/mlp", "log10_lam/patch"]
    assert sum(i.total for i in analysis.importance[2:]) < 0.02
    scales = {i.parameter: i.lengthscale for i in analysis.importance}
    assert scales["rho/mlp"] < scales["rho/attention"]
    assert [e.parameter for e in analysis.effects] == [i.parameter for i in analysis.importance]


def test_undoing_what_helped_costs_and_undoing_what_hurt_gains(study, analysis):
    top = best(study)
    unit = GROUPS.to_unit(GROUPS.point_of(top.hyperparameters))
    expected = {
        "mlp": 0.3 * (unit[MLP] - 0.9) ** 2 - 0.3 * (0.5 - 0.9) ** 2,
        "patch": 0.2 * (unit[PATCH] - DEFAULT_LAM) ** 2,
        "attention": 0.0,
    }
    assert expected["mlp"] < -0.03
    assert expected["patch"] > 0
    found = {a.group: a.change for a in analysis.ablations}
    assert {g: c.mean for g, c in found.items()} == pytest.approx(expected, abs=1e-3)
    assert all(0 < c.sd < 5e-3 for c in found.values())
    assert analysis.ablations[0].group == "mlp"
    assert sorted(analysis.ablations[0].parameters) == ["log10_lam/mlp", "rho/mlp"]


def test_effects_are_in_the_parameters_own_units(analysis):
    effects = {e.parameter: e for e in analysis.effects}
    rho, lam = effects["rho/mlp"], effects["log10_lam/patch"]
    assert len(rho.grid) == len(rho.mean) == len(rho.sd) == 25
    assert (rho.grid[0], rho.grid[-1], rho.default) == (0.5, 1.5, 1.0)
    assert rho.grid[int(np.argmax(rho.mean))] == pytest.approx(1.4, abs=0.03)
    assert (lam.grid[0], lam.grid[-1], lam.default) == (-4.0, 3.0, 0.0)
    assert lam.grid[int(np.argmax(lam.mean))] == pytest.approx(0.0, abs=0.2)
    assert min(rho.sd) > 0


def test_effects_know_where_the_best_is(study, analysis):
    point = GROUPS.point_of(best(study).hyperparameters)
    assert {e.parameter: e.best for e in analysis.effects} == pytest.approx(point)


def test_a_smooth_objective_is_predicted(study, analysis):
    found = analysis.prediction
    assert found.trials == [t.number for t in study]
    assert found.observed == [t.objective for t in study]
    assert found.r2 > 0.99
    assert found.r2_refitted > 0.99
    residuals = (np.array(found.observed) - found.mean) / found.sd
    np.testing.assert_allclose(found.residuals, residuals)
    assert found.coverage == np.mean(np.abs(residuals) <= 1.96)


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_not_predicted(seed):
    generator = np.random.default_rng(seed)
    rows = rows_at(GROUPS, sobol_points(40, len(GROUPS)), lambda unit: 0.8 + 0.01 * generator.standard_normal())
    found = analyse_rows(rows, GROUPS, EXPERTS).prediction
    assert found.r2_refitted < 0.1
    assert found.r2 < 0.25
    assert found.coverage >= 0.85


def test_progress_follows_the_best(study, analysis):
    found = analysis.progress
    assert found.best == np.maximum.accumulate(found.objectives).tolist()
    assert (found.anchor, found.default) == (study[0].objective, study[1].objective)
    for task, shift in (("one", 0.1), ("two", -0.1)):
        np.testing.assert_allclose(found.tasks[task], np.array(found.best) + shift)


def test_certainty_of_the_best(study, analysis):
    found, top = analysis.certainty, best(study)
    assert (found.best.trial, found.best.observed) == (top.number, top.objective)
    assert found.best.mean == pytest.approx(top.objective, abs=2e-3)
    assert found.expected_best.mean >= found.best.mean
    assert found.lead.mean == pytest.approx(found.expected_best.mean - found.best.mean)
    assert found.over_anchor.mean == pytest.approx(top.objective - study[0].objective, abs=3e-3)
    assert found.over_default.mean > 2 * found.over_default.sd


def test_a_lucky_trial_is_not_the_expected_best():
    """One trial far above its smooth surroundings, in noise: the model names another."""
    generator = np.random.default_rng(2)
    units = np.repeat(sobol_points(16, len(GROUPS)), 4, axis=0)
    rows = rows_at(GROUPS, units, lambda unit: value(unit) + 0.01 * generator.standard_normal())
    worst = min(rows[2:], key=lambda t: t.objective)
    rows[worst.number] = replace(worst, objective=max(t.objective for t in rows) + 0.01)
    found = analyse_rows(rows, GROUPS, EXPERTS).certainty
    assert found.best.trial == worst.number
    assert found.expected_best.trial != worst.number
    assert found.best.mean < found.best.observed - 0.01
    assert found.lead.mean > 0


def test_searched_task_weights_go_back_together():
    space = GROUPS.extended(gamma=0.5, weights={"one": 1.0, "two": 2.0})
    rows = rows_at(space, sobol_points(20, len(space)), lambda unit: 0.8 + 0.1 * unit[-1])
    found = {a.group: a.parameters for a in analyse_rows(rows, space, EXPERTS).ablations}
    assert set(found) == {"attention", "mlp", "patch", "gamma", "log10_weight"}
    assert found["log10_weight"] == ["log10_weight/one", "log10_weight/two"]


def test_json_round_trip(analysis):
    text = json.dumps(analysis.to_json(), allow_nan=False)
    assert Analysis.from_json(json.loads(text)) == analysis


def test_equal_objectives_and_a_failed_start_survive_json():
    rows = rows_at(GROUPS, sobol_points(10, len(GROUPS)), lambda unit: 0.5)
    rows[1] = replace(rows[1], status="failed", objective=None, scores={})
    found = analyse_rows(rows, GROUPS, EXPERTS)
    assert found.prediction.r2 is None
    assert found.prediction.r2_refitted is None
    assert found.progress.default is None
    assert found.certainty.over_default is None
    assert found.certainty.over_anchor is not None
    assert {i.total for i in found.importance} == {0.0}
    assert Analysis.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_failed_trials_are_left_out():
    rows = rows_of(SPACE, 40)
    failed = [t.number for t in rows if t.status == "failed"]
    assert failed
    found = analyse_rows(rows, SPACE, REFERENCE)
    assert (found.completed, found.failed) == (40 - len(failed), len(failed))
    assert not set(failed) & set(found.prediction.trials)
    assert found == replace(
        analyse_rows([t for t in rows if t.status == "completed"], SPACE, REFERENCE), failed=found.failed
    )
    assert set(found.progress.tasks) == set(REFERENCE)


def test_a_killed_study_is_analysed_from_folder_and_result(tmp_path, monkeypatch):
    folder = killed_study(tmp_path / "run", budget=20, kill_at=14)
    found = bmm.analyse(folder)
    assert (found.completed + found.failed, found.pending) == (14, 1)
    assert found.progress.trials[-1] <= 13
    monkeypatch.chdir(tmp_path)
    assert bmm.load_study("run").analysis() == found


def test_too_few_trials_are_refused(tmp_path):
    folder = killed_study(tmp_path / "run", budget=20, kill_at=7)
    with pytest.raises(StudyError, match="needs 8 completed trials, the study has 7") as error:
        bmm.analyse(folder)
    assert "--resume" in error.value.hint


def test_a_result_without_its_study_is_refused(tmp_path):
    folder = killed_study(tmp_path / "run", budget=20, kill_at=10)
    result = bmm.load_study(folder)
    (folder / "study.db").unlink()
    with pytest.raises(StudyError, match="no study"):
        result.analysis()
