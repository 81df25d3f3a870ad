import math
from dataclasses import replace

import numpy as np
import pytest

from bmm.errors import StudyError
from bmm.records import Choice, StudyResult, Trial
from bmm.report.choice import choice_lines, choice_section
from bmm.search.choice import Race, choose, corrections, finalists
from bmm.search.goal import Goal
from bmm.search.space import Space
from bmm.search.study import best

SPACE = Space.for_groups(["all"])
TASKS = [f"t{k}" for k in range(8)]
GOAL = Goal.of(dict.fromkeys(TASKS, 1.0))
INPUTS = dict.fromkeys(TASKS, 192)
SHARE = 0.25


def point(unit):
    return SPACE.to_hyperparameters(SPACE.from_unit(np.array(unit)))


def trial(number, score, unit=None, kind="search", status="completed", **scores):
    found = dict.fromkeys(TASKS, score) | scores
    return Trial(number, kind, status, point(unit or [0.01 * number, 0.5]), found, GOAL.value(found))


def coin(probability, offset, count=64):
    """Held-out scores of a model: on one common order of difficulty, the easiest ones right."""
    difficulty = np.random.default_rng(offset).permutation((np.arange(count) + 0.5) / count)
    return (difficulty < probability).astype(float)


class Measured:
    """Held-out inputs, and how often each trial was scored on them."""

    def __init__(self, truth):
        self.truth, self.calls = truth, []

    def __call__(self, trial, tasks):
        self.calls += [(trial.number, task) for task in tasks]
        return {task: coin(self.truth[trial.number], int(task[1:])) for task in tasks}


def decide(trials, measure=None, method="observed", count=4, goal=GOAL, seed=0):
    share = SHARE if measure else 0.0
    keys = {"method": method, "inputs": INPUTS, "seed": seed, "finalist_count": count, "share": share}
    return choose(trials, SPACE, goal, measure=measure, **keys)


def test_without_race_and_model_the_best_observed_trial_wins():
    trials = [trial(n, s) for n, s in enumerate([0.7, 0.8, 0.85, 0.84])] + [trial(4, 0.9, status="failed")]
    winner, choice = decide(trials)
    assert winner == best(trials) == trials[2]
    assert choice == Choice("observed", 2, 2)
    with pytest.raises(StudyError, match="no trial"):
        decide(trials[4:])


def test_the_model_does_not_believe_in_a_lucky_neighbour_of_bad_trials():
    units = np.linspace(0.05, 0.95, 19)
    values = [0.8 - (u - 0.7) ** 2 for u in units]
    values[3] = 0.815  # .64 expected there
    trials = [trial(n, v, [u, 0.5]) for n, (u, v) in enumerate(zip(units, values, strict=True))]
    trials += [trial(19 + k, 0.64 + 0.001 * k, [units[3] + 0.002 * k, 0.5]) for k in range(1, 4)]
    assert best(trials).number == 3
    winner, choice = decide(trials, method="model")
    assert winner.number == 13
    assert (choice.trial, choice.observed, choice.candidates) == (13, 3, [])
    moved = corrections(trials, SPACE, "model")
    assert trials[3].objective + moved[3] == pytest.approx(0.64, abs=0.06)
    assert set(corrections(trials, SPACE, "observed").values()) == {0.0}


def test_a_race_finds_the_better_one_and_leaves_the_hopeless_behind():
    trials = [trial(0, 0.70), trial(1, 0.81), trial(2, 0.82), trial(3, 0.60)]
    measure = Measured({0: 0.60, 1: 52 / 64, 2: 50 / 64})
    winner, choice = decide(trials, measure, count=3)
    assert winner == trials[1]
    assert (choice.trial, choice.observed, choice.tasks) == (1, 2, 8)
    first, second, third = choice.candidates
    assert [c.trial for c in choice.candidates] == [1, 2, 0]
    assert (first.holdout, second.holdout) == pytest.approx((52 / 64, 50 / 64))
    assert first.pooled == pytest.approx((192 * 0.81 + 52) / 256)
    assert (first.search, first.expected, first.dropped) == (trials[1].objective, trials[1].objective, False)
    assert third.dropped
    assert third.tasks == 2  # a quarter of them a round
    assert third.holdout is None
    assert choice.used == len(measure.calls) == len(set(measure.calls)) == sum(c.tasks for c in choice.candidates)
    assert choice.used + choice.saved == 24
    assert second.pooled < first.pooled


def test_a_race_ends_when_one_is_left():
    measure = Measured({0: 0.5, 1: 0.9})
    winner, choice = decide([trial(0, 0.60), trial(1, 0.90)], measure)
    assert winner.number == 1
    assert [(c.tasks, c.dropped) for c in choice.candidates] == [(2, False), (2, True)]
    assert choice.saved == 12


def test_models_that_differ_by_luck_alone_stay_to_the_end_whatever_the_order_of_tasks():
    trials, orders = [trial(n, 0.8 + 0.0005 * n) for n in range(4)], []

    def measure(trial, tasks):
        orders[-1] += [task for task in tasks if task not in orders[-1]]
        return {t: (np.random.default_rng([trial.number, int(t[1:])]).random(64) < 0.8).astype(float) for t in tasks}

    for seed in (0, 1):
        orders.append([])
        _, choice = decide(trials, measure, seed=seed)
        assert sum(c.tasks == 8 for c in choice.candidates) >= 3
    assert sorted(orders[0]) == sorted(orders[1]) == TASKS
    assert orders[0] != orders[1]


@pytest.mark.parametrize("goal", [{"kind": "worst"}, {"floor": {"*": 0.75}}])
def test_other_goals_than_the_mean_drop_nobody_and_are_judged_by_both_scores(goal):
    aim = Goal.of(dict.fromkeys(TASKS, 1.0), **goal)
    lopsided = trial(1, 0.95, t3=0.76)
    trials = [trial(0, 0.80), replace(lopsided, objective=aim.value(lopsided.scores))]
    measure = Measured({0: 0.80, 1: 0.62})  # what the search saw of t3 was luck
    winner, choice = decide(trials, measure, goal=aim)
    assert winner.number == 0
    assert choice.used == 16
    assert not any(c.dropped for c in choice.candidates)


def test_scores_that_are_not_finite_lose():
    def measure(trial, tasks):
        return {task: np.full(4, math.nan if trial.number else 1.0) for task in tasks}

    winner, choice = decide([trial(0, 0.5), trial(1, 0.9)], measure)
    assert winner.number == 0
    assert [(c.dropped, c.tasks) for c in choice.candidates] == [(False, 2), (True, 0)]
    assert math.isfinite(choice.candidates[1].pooled)
    winner, choice = decide([trial(1, 0.5), trial(2, 0.9)], measure)  # nothing to go by but the search's scores
    assert winner.number == 2
    negative = Goal.of(dict.fromkeys(TASKS, 1.0), kind="geometric")
    lossy = Measured({1: 0.8, 2: 0.8})
    lossy_held = lambda t, tasks: {k: v - 4 * (t.number == 2) for k, v in lossy(t, tasks).items()}  # noqa: E731
    assert decide([trial(1, 0.5), trial(2, 0.9)], lossy_held, goal=negative)[0].number == 1


def test_anchor_and_default_are_finalists_where_they_are_close():
    def entrants(anchor, count=2):
        trials = [trial(0, anchor, kind="anchor"), trial(1, 0.6, kind="default"), trial(2, 0.81), trial(3, 0.83)]
        trials += [trial(4, 0.82), trial(5, 0.99, status="stopped")]
        moved = dict.fromkeys(range(6), 0.0)
        return [t.number for t in finalists(trials, GOAL, moved, count, INPUTS)]

    assert entrants(0.70) == [3, 4]
    assert entrants(0.825) == [3, 0]
    assert entrants(0.818) == [3, 4, 0]  # a standard error of the difference is .013
    assert entrants(0.70, count=9) == [3, 4, 2, 0, 1]


def test_the_correction_of_the_model_counts_for_the_search_inputs_alone():
    race = Race([trial(0, 0.8)], GOAL, {0: -0.04}, INPUTS, SHARE, lambda *_: {})
    assert race.estimate(0) == pytest.approx(0.76)
    race.held[0] = {task: np.ones(64) for task in TASKS}
    assert race.estimate(0) == pytest.approx((0.76 * 192 + 64) / 256)


def test_the_report_tells_of_the_race_and_the_record_survives_json():
    trials = [trial(0, 0.70), trial(1, 0.81), trial(2, 0.82)]
    winner, choice = decide(trials, Measured({0: 0.60, 1: 52 / 64, 2: 50 / 64}))
    result = StudyResult(winner, trials, {}, {}, {}, {}, choice=choice)
    assert StudyResult.from_json(result.to_json()) == result
    assert choice_lines(result) == [
        "chosen by the observed score, pooled with the score on the 25 % of validation inputs held out of the search: "
        "trial 1, not trial 2, the best observed"
    ]
    text = "\n".join(choice_section(result))
    assert "dropped after 2 of 8 tasks" in text
    assert f"{choice.used} held-out task scores; {choice.saved} saved" in text
    model = replace(result, choice=Choice("model", 1, 1))
    assert choice_lines(model) == [
        "chosen by the mean of a model of all trials: trial 1, which also has the best observed score"
    ]
    assert choice_section(model) == choice_section(replace(result, choice=None)) == []
