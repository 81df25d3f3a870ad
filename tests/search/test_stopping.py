"""Early stopping: the forecast against the textbook formula, and studies that score fewer tasks."""

import json
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmm.errors import StudyError
from bmm.records import Hyperparameters, Trial
from bmm.search.database import StudyDatabase
from bmm.search.stopping import MIN_TRIALS, Forecaster, Stopper, order_of_tasks
from bmm.search.study import best, run_study
from tests.search.problem import REFERENCE, SPACE, evaluate, outcomes

TASKS = [f"t{k}" for k in range(5)]
EQUAL = dict.fromkeys(TASKS, 0.2)


def drawn(count, seed=0, shared=0.9):
    generator = np.random.default_rng(seed)
    common = generator.standard_normal((count, 1))
    scores = 0.7 + 0.05 * (shared * common + (1 - shared**2) ** 0.5 * generator.standard_normal((count, len(TASKS))))
    return [dict(zip(TASKS, row.tolist(), strict=True)) for row in scores]


def test_the_forecast_is_the_conditional_mean_and_deviation_of_a_gaussian():
    forecaster = Forecaster(drawn(30), {t: k + 1.0 for k, t in enumerate(TASKS)})
    scores = {"t1": 0.8, "t4": 0.6}
    found = forecaster(scores)
    known, missing = [1, 4], [0, 2, 3]
    s, mu = forecaster.covariance, forecaster.mean
    gain = s[np.ix_(missing, known)] @ np.linalg.inv(s[np.ix_(known, known)])
    expected = mu[missing] + gain @ (np.array([0.8, 0.6]) - mu[known])
    spread = s[np.ix_(missing, missing)] - gain @ s[np.ix_(known, missing)]
    weights = np.array([1.0, 3.0, 4.0])
    assert found.mean == pytest.approx(weights @ expected + 2 * 0.8 + 5 * 0.6, rel=1e-9)
    assert found.deviation == pytest.approx(float(np.sqrt(weights @ spread @ weights * 30 / 27)), rel=1e-9)
    np.testing.assert_allclose([found.scores[TASKS[k]] for k in missing], expected, rtol=1e-9)
    assert found.scores["t1"] == 0.8


def test_forecasts_are_as_sure_as_they_say():
    """Of many trials from one distribution, the share whose objective lies below the forecast's quantiles."""
    forecaster, inside = Forecaster(drawn(40, seed=1), EQUAL), []
    for row in drawn(2000, seed=2):
        found = forecaster({t: row[t] for t in TASKS[:2]})
        inside.append(abs(np.mean(list(row.values())) - found.mean) < 1.96 * found.deviation)
    assert 0.89 < np.mean(inside) < 0.99


def test_all_tasks_known_is_certainty_and_constant_tasks_are_no_trouble():
    rows = [row | {"t0": 0.5} for row in drawn(10)]
    forecaster = Forecaster(rows, EQUAL)
    whole = forecaster(rows[0])
    assert whole.deviation == 0
    assert whole.mean == pytest.approx(np.mean(list(rows[0].values())))
    assert whole.chance_above(whole.mean - 1e-9) == 1
    assert whole.chance_above(whole.mean) == 0
    only = forecaster({"t0": 0.5})
    assert only.mean == pytest.approx(np.mean([list(r.values()) for r in rows]))
    with pytest.raises(ValueError, match="needs two"):
        Forecaster(rows[:1], EQUAL)


@given(st.integers(0, 10**6), st.integers(0, 500))
def test_the_order_is_a_permutation_of_its_own_for_every_trial(seed, number):
    order = order_of_tasks(TASKS, seed, number)
    assert sorted(order) == TASKS
    assert order == order_of_tasks(list(reversed(TASKS)), seed, number)


class Read(Mapping):
    """A mapping that remembers what was read of it."""

    def __init__(self, scores):
        self.scores, self.read = scores, []

    def __getitem__(self, task):
        self.read.append(task)
        return self.scores[task]

    def __iter__(self):
        return iter(self.scores)

    def __len__(self):
        return len(self.scores)


def trials_of(rows, kind="search"):
    point = Hyperparameters({}, {})
    return [Trial(k, kind, "completed", point, row, float(np.mean(list(row.values())))) for k, row in enumerate(rows)]


def test_a_loser_is_stopped_after_few_tasks_and_a_winner_never():
    trials = trials_of(drawn(20))
    stopper = Stopper(EQUAL, 0, 0.05)
    new = Trial(20, "search", "pending", Hyperparameters({}, {}))
    bad = Read(dict.fromkeys(TASKS, 0.3))
    scores, forecast = stopper.scores(new, trials, bad)
    assert forecast is not None
    assert bad.read == list(scores) == order_of_tasks(TASKS, 0, 20)[: len(scores)]
    assert len(scores) < 3
    good = Read(dict.fromkeys(TASKS, 0.95))
    scores, forecast = stopper.scores(new, trials, good)
    assert forecast is None
    assert sorted(scores) == TASKS
    assert stopper.scores(new, trials[: MIN_TRIALS - 1], bad)[1] is None
    for kind in ("anchor", "default"):
        assert stopper.scores(Trial(20, kind, "pending", Hyperparameters({}, {})), trials, bad)[1] is None
    later = [Trial(t.number + 21, t.kind, t.status, t.hyperparameters, t.scores, t.objective) for t in trials]
    assert stopper.scores(new, later, bad)[1] is None  # rows that came after it do not count


def study(path, engine="sobol", budget=30, **kwargs):
    made = {"recipe": {"anchor": "problem"}}
    opened = StudyDatabase.open(path) if path.exists() else StudyDatabase.create(path, made)
    read = []

    def lazily(point):
        read.append(Read(evaluate(point)))
        return read[-1]

    with opened as database:
        keys = {"reference": REFERENCE, "budget": budget, "seed": 1, "engine": engine, "early_stopping": 0.05}
        return run_study(database, SPACE, lazily, **(keys | kwargs)), read


def test_a_study_scores_fewer_tasks_and_finds_the_same_best(tmp_path):
    whole, _ = study(tmp_path / "whole.db", early_stopping=0.0)
    trials, read = study(tmp_path / "stopped.db")
    stopped = [t for t in trials if t.status == "stopped"]
    assert len(stopped) > 5
    assert sum(len(r.read) for r in read) < 0.8 * len(REFERENCE) * len(read)
    assert best(trials).number == best(whole).number
    assert best(trials).objective == best(whole).objective
    for trial in stopped:
        assert 0 < len(trial.scores) < len(REFERENCE)
        assert trial.objective < best(trials).objective
        assert Trial.from_json(json.loads(json.dumps(trial.to_json()))) == trial
    with StudyDatabase.open(tmp_path / "stopped.db", readonly=True) as database:
        assert database.trials() == trials


def test_a_failure_after_some_tasks_fails_the_trial(tmp_path):
    def broken(point):
        scores = evaluate(point)
        return Read(scores | {"task3": float("nan")})

    with StudyDatabase.create(tmp_path / "s.db", {}) as database:
        trials = run_study(
            database, SPACE, lambda p: broken(p) if p.rho["mlp"] > 1.1 else evaluate(p), reference=REFERENCE,
            budget=25, seed=1, engine="sobol", early_stopping=0.4,
        )  # fmt: skip
    assert {"failed", "stopped", "completed"} == {t.status for t in trials}


@pytest.mark.parametrize("engine", ["sobol", "botorch"])
def test_resuming_a_study_with_stopped_trials_changes_no_row(tmp_path, engine):
    whole, _ = study(tmp_path / "whole.db", engine, 16)
    for budget in (9, 13, 16):
        cut, _ = study(tmp_path / "cut.db", engine, budget)
    assert outcomes(cut) == outcomes(whole)
    assert any(t.status == "stopped" for t in whole)
    with pytest.raises(StudyError, match="another early_stopping"):
        study(tmp_path / "cut.db", engine, 20, early_stopping=0.0)
