"""Goals: their arithmetic, what they refuse, and what a study makes of them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.analysis.rows import analyse_rows
from bmm.dominance import non_dominated
from bmm.errors import RecipeError, StudyError
from bmm.records import Hyperparameters, StudyResult, Trial
from bmm.search.database import StudyDatabase
from bmm.search.goal import PENALTY, Goal, parse_objectives
from bmm.search.study import best, run_study
from tests.search import problem
from tests.search.problem import REFERENCE, SPACE, outcomes

EXPERTS = {"a": 0.8, "b": 0.5, "c": 1.0}
SCORES = {"a": 0.72, "b": 0.4, "c": 0.5}  # shares of the experts': 0.9, 0.8, 0.5
POINT = Hyperparameters.uniform(["q"], 1.0)


@pytest.mark.parametrize(
    ("kind", "weights", "value"),
    [
        ("mean", None, 2.2 / 3),
        ("mean", {"a": 2, "b": 1, "c": 1}, (1.8 + 0.8 + 0.5) / 4),
        ("worst", None, 0.5),
        ("worst", {"a": 2, "b": 1, "c": 0}, 0.8),
        ("geometric", None, (0.9 * 0.8 * 0.5) ** (1 / 3)),
        ("geometric", {"a": 1, "b": 0, "c": 3}, 0.9**0.25 * 0.5**0.75),
    ],
)
def test_values_by_hand(kind, weights, value):
    goal = Goal.of(EXPERTS, weights, kind)
    assert goal.value(SCORES) == pytest.approx(value, rel=1e-12)
    assert goal.values(SCORES) == {"": goal.value(SCORES)}
    assert goal.plain == (kind == "mean")


def test_objectives_are_means_of_their_own_tasks_and_the_objective_is_theirs():
    goal = Goal.of(EXPERTS, {"a": 3, "b": 1, "c": 1}, objectives=["c", "two=a+b"])
    assert goal.values(SCORES) == pytest.approx({"c": 0.5, "two": 0.75 * 0.9 + 0.25 * 0.8})
    assert goal.value(SCORES) == pytest.approx((0.5 + 0.875) / 2)
    worst = Goal.of(EXPERTS, kind="worst", objectives=["left=a+b", "right=b+c"])
    assert worst.values(SCORES) == pytest.approx({"left": 0.8, "right": 0.5})


def test_the_geometric_mean_of_nothing_is_nothing_and_of_less_is_refused():
    goal = Goal.of(EXPERTS, kind="geometric")
    assert goal.value(SCORES | {"a": 0.0}) == 0
    with pytest.raises(ValueError, match=r"below 0: a -0\.1"):
        goal.value(SCORES | {"a": -0.1})


def test_floors_by_hand():
    goal = Goal.of(EXPERTS, floor={"*": 0.85, "c": 0.4})
    assert goal.floors == {"a": 0.85, "b": 0.85, "c": 0.4}
    assert goal.shortfalls(SCORES) == pytest.approx({"b": 0.05})
    assert goal.violation(SCORES) == pytest.approx(0.05)
    assert goal.violation({"a": 0.8 * 0.85, "b": 0.5 * 0.85, "c": 0.4}) == 0
    trial = Trial(3, "search", "completed", POINT, SCORES, 0.7)
    assert goal.penalised(trial).objective == pytest.approx(0.7 - PENALTY * 0.05)
    assert Goal.of(EXPERTS, floor={"a": 0.9}).penalised(trial) == trial
    assert Goal.of(EXPERTS, floor={"a": 0.9}).floors == {"a": 0.9}


ratios = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.0, 1.5), min_size=1)


@settings(deadline=None, max_examples=80)
@given(ratios, st.data())
def test_worst_is_at_most_geometric_is_at_most_mean(ratios, data):
    reference = {t: data.draw(st.floats(0.1, 1.0)) for t in ratios}
    scores = {t: ratio * reference[t] for t, ratio in ratios.items()}
    worst, geometric, mean = (Goal.of(reference, kind=k).value(scores) for k in ("worst", "geometric", "mean"))
    assert worst <= geometric * (1 + 1e-12) + 1e-300
    assert geometric <= mean * (1 + 1e-12)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), max_size=9))
def test_a_front_beats_everything_else_and_nothing_of_itself(points):
    front = [points[i] for i in non_dominated(points)]

    def beats(p, q):
        return all(a >= b for a, b in zip(p, q, strict=True)) and p != q

    assert len(set(front)) == len(front)
    assert not any(beats(p, q) for p in front for q in front)
    assert all(q in front or any(beats(p, q) for p in front) for q in points)


def test_a_goal_survives_json():
    goal = Goal.of(EXPERTS, {"a": 1, "b": 2, "c": 0}, "worst", {"*": 0.9}, ["x=a+b", "b"])
    assert Goal.from_json(json.loads(json.dumps(goal.to_json()))) == goal


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["a"], "one objective"),
        (["a", "a"], "two objectives are called a"),
        (["a", "x=b+b"], "names b twice"),
        (["a", "b+c"], "has no name\n  hint: write NAME=b"),
        (["a", "x="], "names no task"),
        (["a", "=b"], "names no task"),
        (["a", ""], "names no task"),
    ],
)
def test_objectives_that_make_no_sense(texts, said):
    with pytest.raises(RecipeError, match=said):
        parse_objectives(texts)


@pytest.mark.parametrize("value", [0.0, -0.1, 1.6, math.nan, math.inf])
def test_floors_outside_their_range(value):
    with pytest.raises(RecipeError, match=r"not in \(0, 1.5\]"):
        Goal.of(EXPERTS, floor={"*": value})


def test_an_objective_without_weight_is_refused():
    with pytest.raises(RecipeError, match="'x': all of its tasks have weight 0"):
        Goal.of(EXPERTS, {"a": 1, "b": 1, "c": 0}, objectives=["a", "x=c"])


def rows(*scores):
    goal = Goal.of(EXPERTS)
    return [Trial(n, "search", "completed", POINT, s, goal.value(s)) for n, s in enumerate(scores)]


def test_the_best_trial_keeps_the_floors_or_misses_them_least():
    high = {"a": 0.8, "b": 0.5, "c": 0.6}
    even = {"a": 0.64, "b": 0.4, "c": 0.8}
    trials = rows(high, even, {"a": 0.6, "b": 0.4, "c": 0.8})
    assert best(trials).number == 0
    assert best(trials, Goal.of(EXPERTS, floor={"*": 0.75})).number == 1
    assert best(trials, Goal.of(EXPERTS, floor={"*": 0.95})).number == 0  # short by 0.35, the others by 0.45 and 0.5
    assert best(trials, Goal.of(EXPERTS, floor={"c": 0.9})).number == 1  # as short as trial 2, and better


def result_of(trials, goal):
    return StudyResult(best(trials, goal), list(trials), {}, {}, {}, {}, **goal.judged(trials))


def test_the_front_of_a_result_keeps_floors_and_has_no_doubles():
    goal = Goal.of(EXPERTS, floor={"c": 0.5}, objectives=["a", "b"])
    points = [(0.4, 0.4, 1.0), (0.8, 0.3, 1.0), (0.8, 0.3, 1.0), (0.4, 0.5, 1.0), (0.4, 0.3, 1.0), (0.8, 0.5, 0.2)]
    trials = rows(*(dict(zip("abc", p, strict=True)) for p in points))
    trials.append(replace(trials[0], number=6, status="failed", scores={}, objective=None))
    result = result_of(trials, goal)
    assert [(t.number, v) for t, v in result.pareto()] == [(1, {"a": 1.0, "b": 0.6}), (3, {"a": 0.5, "b": 1.0})]
    assert StudyResult.from_json(json.loads(json.dumps(result.to_json()))) == result
    unkept = result_of(trials[5:6], Goal.of(EXPERTS, floor={"c": 0.5}, objectives=["a", "b"]))
    assert [t.number for t, _ in unkept.pareto()] == [5]
    with pytest.raises(StudyError, match="one objective"):
        result_of(trials, Goal.of(EXPERTS)).pareto()


def study(path, **changes):
    plain = {"reference": REFERENCE, "budget": 8, "seed": 0, "engine": "sobol"}
    database = StudyDatabase.open(path) if path.exists() else StudyDatabase.create(path, {})
    with database:
        return run_study(database, SPACE, problem.evaluate, **{**plain, **changes})


def test_a_study_ranks_by_its_goal_and_records_it(tmp_path):
    goal = {"goal": "worst", "floor": {"*": 0.5, "task3": 0.6}}
    leaders = []
    trials = study(tmp_path / "s.db", on_trial=lambda trial, leader: leaders.append(leader), **goal)
    aim = Goal.of(REFERENCE, kind="worst", floor=goal["floor"])
    for trial in trials:
        if trial.status == "completed":
            assert trial.objective == min(trial.scores[t] / REFERENCE[t] for t in REFERENCE)
    assert leaders[-1] == best(trials, aim)
    with StudyDatabase.open(tmp_path / "s.db", readonly=True) as database:
        assert Goal.from_json(database.meta()["search"]) == aim
    assert study(tmp_path / "s.db", **goal) == trials


def test_an_analysis_is_about_the_trial_that_keeps_the_floors(tmp_path):
    floor = {"task3": 0.8}
    trials = study(tmp_path / "s.db", budget=9, floor=floor)
    aim = Goal.of(REFERENCE, floor=floor)
    assert best(trials, aim) != best(trials)
    leaders = [best(trials[: n + 1], aim) for n, t in enumerate(trials) if t.status == "completed"]
    found = analyse_rows(trials, SPACE, REFERENCE, aim)
    assert found.progress.best == [t.objective for t in leaders]
    assert found.progress.tasks["task3"][-1] == best(trials, aim).scores["task3"] / REFERENCE["task3"]


def test_a_study_from_before_there_were_goals_goes_on(tmp_path):
    whole = study(tmp_path / "whole.db")
    study(tmp_path / "old.db", budget=4)
    with StudyDatabase.open(tmp_path / "old.db") as database:
        identity = database.meta()["search"]
        for key in ("goal", "floor", "objectives"):
            del identity[key]
        database.set_meta("search", identity)
    assert outcomes(study(tmp_path / "old.db")) == outcomes(whole)
    with pytest.raises(StudyError, match="another goal"):
        study(tmp_path / "old.db", goal="geometric")


def test_the_plain_mean_is_what_it_was():
    goal = Goal.of(REFERENCE)
    scores = problem.evaluate(SPACE.default())
    assert goal.value(scores) == math.fsum(1 / 8 * (scores[t] / REFERENCE[t]) for t in sorted(REFERENCE))
    shares = goal.coefficients()
    assert np.isclose(sum(shares[t] * scores[t] for t in scores), goal.value(scores), rtol=1e-12)
