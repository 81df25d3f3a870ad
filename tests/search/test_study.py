import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.errors import RecipeError, StudyError
from bmm.records import Hyperparameters, Trial
from bmm.search.database import StudyDatabase
from bmm.search.engines.common import SobolEngine
from bmm.search.goal import Goal
from bmm.search.space import Space
from bmm.search.study import best, run_study
from tests.search import problem
from tests.search.problem import REFERENCE, SPACE, outcomes

PLAIN = {"reference": REFERENCE, "budget": 12, "seed": 0, "engine": "sobol"}


def study(path, evaluate=problem.evaluate, space=SPACE, **changes):
    database = StudyDatabase.open(path) if path.exists() else StudyDatabase.create(path, {})
    with database:
        return run_study(database, space, evaluate, **{**PLAIN, **changes})


def stored(path):
    with StudyDatabase.open(path, readonly=True) as database:
        return database.trials()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study.db"


def constant(hyperparameters):
    return dict(REFERENCE)


def test_a_study_starts_from_anchor_and_default_and_keeps_to_its_budget(path):
    seen = []

    def evaluate(hyperparameters):
        rows = stored(path)
        assert rows[-1].status == "pending"  # committed before it is evaluated
        assert rows[-1].hyperparameters == hyperparameters
        return problem.evaluate(hyperparameters)

    trials = study(path, evaluate, on_trial=lambda trial, leader: seen.append((trial, leader)))
    assert [t.number for t in trials] == list(range(12))
    assert [t.kind for t in trials] == ["anchor", "default"] + ["search"] * 10
    assert trials[0].hyperparameters == SPACE.anchor()
    assert trials[1].hyperparameters == SPACE.default()
    assert trials == stored(path)
    assert [trial for trial, _ in seen] == trials
    assert [leader for _, leader in seen] == [best(trials[: n + 1]) for n in range(12)]
    for trial in trials:
        if trial.status == "completed":
            assert trial.scores == problem.evaluate(trial.hyperparameters)
            assert trial.objective == pytest.approx(sum(trial.scores[t] / REFERENCE[t] for t in REFERENCE) / 8)
    assert best(trials).objective >= trials[0].objective
    assert all(t.seconds > 0 for t in trials)


def test_two_studies_of_one_seed_are_equal_and_of_two_seeds_are_not(tmp_path):
    first, second, other = (study(tmp_path / f"{i}.db", seed=s) for i, s in enumerate((1, 1, 2)))
    assert outcomes(first) == outcomes(second)
    assert outcomes(first)[2:] != outcomes(other)[2:]


def test_a_larger_budget_goes_on_where_the_smaller_ended(tmp_path, path):
    short = study(path, budget=5)
    assert len(short) == 5
    assert study(path, constant, budget=5) == short  # nothing left to evaluate
    assert outcomes(study(path, budget=12)) == outcomes(study(tmp_path / "whole.db"))
    with pytest.raises(StudyError, match="holds 12 trials, the budget is 11"):
        study(path, budget=11)


def test_failures_are_recorded_and_survived(path):
    calls = []

    class StrangeError(Exception):
        pass

    def evaluate(hyperparameters):
        calls.append(hyperparameters)
        number = len(calls) - 1
        if number == 0:
            raise StrangeError("two\nlines")
        if number == 2:
            raise MemoryError
        scores = problem.evaluate(SPACE.default())
        if number in (3, 4):
            scores["task1"] = (math.nan, -math.inf)[number - 3]
        if number == 5:
            del scores["task7"]
        if number == 6:
            scores["task9"] = 1.0
        if number == 7:
            scores["task0"] = None
        if number == 8:
            return None
        if number == 9:
            scores = dict.fromkeys(scores, 1.7e308)
        return scores

    leaders = []
    trials = study(path, evaluate, on_trial=lambda trial, leader: leaders.append(leader), budget=11)
    assert trials == stored(path)
    assert {t.number: t.error for t in trials if t.status == "failed"} == {
        0: "StrangeError: two\nlines",
        2: "MemoryError: ",
        3: "ValueError: score not finite: task1 nan",
        4: "ValueError: score not finite: task1 -inf",
        5: "ValueError: scores and tasks do not agree on task7",
        6: "ValueError: scores and tasks do not agree on task9",
        7: trials[7].error,
        8: trials[8].error,
        9: "ValueError: objective not finite: inf",
    }
    assert "TypeError" in trials[7].error
    assert "AttributeError" in trials[8].error
    assert all((t.objective, t.scores) == (None, {}) for t in trials if t.status == "failed")
    assert leaders[0] is None
    assert leaders[1] == trials[1]
    points = [tuple(t.hyperparameters.lam.values()) for t in trials]
    assert len(set(points)) == len(points)  # what failed is not suggested again


def test_where_anchor_and_default_fail_the_study_ends_with_their_error(path):
    def evaluate(hyperparameters):
        raise OSError("the disk is gone")

    with pytest.raises(StudyError, match="OSError: the disk is gone"):
        study(path, evaluate)
    assert [t.status for t in stored(path)] == ["failed", "failed"]
    with pytest.raises(StudyError, match="OSError: the disk is gone"):
        study(path)
    with pytest.raises(StudyError, match="no trial"):
        best(stored(path))


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("moment", [0, 1, 6])
def test_an_interrupted_trial_stays_pending_and_is_evaluated_on_resuming(tmp_path, path, signal, moment):
    def evaluate(hyperparameters):
        if len(stored(path)) - 1 == moment:
            raise signal
        return problem.evaluate(hyperparameters)

    with pytest.raises(signal):
        study(path, evaluate)
    interrupted = stored(path)
    assert [t.status == "pending" for t in interrupted] == [False] * moment + [True]
    resumed = study(path)
    assert outcomes(resumed) == outcomes(study(tmp_path / "whole.db"))
    assert resumed[moment].suggest_seconds == interrupted[moment].suggest_seconds


def test_several_pending_rows_are_evaluated_first_and_in_order(path):
    with StudyDatabase.create(path, {}) as database:
        database.begin(Trial(0, "anchor", "pending", SPACE.anchor()))
        database.begin(Trial(1, "default", "pending", SPACE.default()))
    done = []
    trials = study(path, budget=4, on_trial=lambda trial, leader: done.append(trial.number))
    assert done == [0, 1, 2, 3]
    assert {t.status for t in trials} <= {"completed", "failed"}


def test_should_stop_ends_the_study_between_trials(tmp_path, path):
    assert len(study(path, should_stop=iter([False] * 4 + [True]).__next__)) == 4
    assert outcomes(study(path)) == outcomes(study(tmp_path / "whole.db"))
    assert study(tmp_path / "none.db", should_stop=lambda: True) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "another seed: 0 there, 1 here"),
        ({"space": Space.for_groups(["attention", "mlp"])}, "another space"),
        ({"space": Space.for_groups(SPACE.groups, log10_lam=(-3, 3))}, "another space"),
        ({"reference": REFERENCE | {"task0": 0.9}}, "another reference"),
        ({"reference": {"task0": 0.9}}, "another reference and weights"),
        ({"weights": {t: 1.0 + (t == "task0") for t in REFERENCE}}, "another weights"),
        ({"goal": "worst"}, "another goal: mean there, worst here"),
        ({"floor": {"*": 0.5}}, "another floor"),
        ({"objectives": ["task0", "task1"]}, "another objectives"),
        ({"engine": "ax"}, "another engine: sobol there, ax here"),
    ],
)
def test_another_search_cannot_go_on_in_a_study(path, changes, said):
    study(path, budget=2)
    before = stored(path)
    with pytest.raises(StudyError, match=said):
        study(path, **changes)
    assert stored(path) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reference": {}}, "at least one task"),
        ({"reference": REFERENCE | {"task0": 0.0}}, "'task0'"),
        ({"reference": REFERENCE | {"task0": -1.0}}, "'task0'"),
        ({"reference": REFERENCE | {"task0": math.nan}}, "'task0'"),
        ({"weights": {"task0": 1.0}}, "do not agree on task1"),
        ({"weights": dict.fromkeys(REFERENCE, 0.0)}, "not all zero"),
        ({"weights": REFERENCE | {"task0": -1.0}}, "not negative"),
        ({"weights": REFERENCE | {"task0": math.inf}}, "finite"),
        ({"budget": 0}, "budget of 0"),
        ({"seed": -1}, "seed -1"),
        ({"engine": "ex"}, "unknown engine"),
        ({"goal": "worst", "early_stopping": 0.1}, "early_stopping does not go with goal worst"),
        ({"goal": "wurst"}, "no goal 'wurst'\n  hint: did you mean worst"),
        ({"floor": {"tusk0": 0.9}}, "unknown task 'tusk0'\n  hint: did you mean task0"),
        ({"floor": {"task0": 0.0}}, "not in"),
        ({"objectives": ["task0", "rest=task1+tusk2"]}, "'rest': unknown task 'tusk2'\n  hint: did you mean task2"),
    ],
)
def test_senseless_arguments_are_refused_before_anything_is_evaluated(path, changes, said):
    def evaluate(hyperparameters):
        raise AssertionError

    with pytest.raises(RecipeError, match=said):
        study(path, evaluate, **changes)
    assert stored(path) == []


def test_weights_count_relative_to_each_other(path):
    def evaluate(hyperparameters):
        return {t: REFERENCE[t] * (2.0 if t == "task0" else 1.0) for t in REFERENCE}

    trials = study(path, evaluate, weights={t: 6.0 if t == "task0" else 2.0 for t in REFERENCE}, budget=2)
    assert trials[0].objective == pytest.approx(1 + 6 / 20)


positive = st.floats(0.01, 1.0)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(max_size=3), st.tuples(positive, positive, positive), min_size=1, max_size=8), st.data())
def test_the_objective_does_not_depend_on_the_order_of_the_tasks(tasks, data):
    order = data.draw(st.permutations(sorted(tasks)))
    scores, reference, weights = ({t: tasks[t][i] for t in tasks} for i in range(3))
    shuffled = ({t: tasks[t][i] for t in order} for i in range(3))
    value = Goal.of(reference, weights).value(scores)
    other_scores, other_reference, other_weights = shuffled
    assert Goal.of(other_reference, other_weights).value(other_scores) == value
    assert Goal.of(reference, weights).value(reference) == pytest.approx(1)


def test_best_is_the_earliest_of_equals_and_never_a_failed_one():
    hyperparameters = Hyperparameters.uniform(["a"], 1.0)
    rows = [Trial(n, "search", "completed", hyperparameters, {}, v) for n, v in enumerate((0.5, 0.9, 0.9, 0.1))]
    assert best(rows).number == 1
    assert best(rows[::-1]).number == 1
    assert best([replace(rows[1], status="failed"), rows[0]]).number == 0


def test_notices_of_the_engine_are_kept(path, monkeypatch):
    told = SobolEngine.ask
    monkeypatch.setattr(SobolEngine, "ask", lambda self, rows: replace(told(self, rows), notice=f"after {len(rows)}"))
    study(path, budget=4)
    with StudyDatabase.open(path, readonly=True) as database:
        assert database.notices() == {2: "after 2", 3: "after 3"}


@pytest.mark.slow
def test_a_model_based_study_interrupted_twice_equals_the_whole_one(tmp_path, path):
    whole = study(tmp_path / "whole.db", engine="botorch", budget=11)
    study(path, engine="botorch", budget=8)
    study(path, engine="botorch", budget=9)
    assert outcomes(study(path, engine="botorch", budget=11)) == outcomes(whole)
    assert best(whole).kind == "search"
