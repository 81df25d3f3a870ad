"""How engines follow goals that are no weighted mean."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bmm.records import Trial
from bmm.search.database import StudyDatabase
from bmm.search.engine import ENGINES, Penalised, build_engine
from bmm.search.engines import goals
from bmm.search.engines.botorch import BotorchEngine
from bmm.search.engines.processes import processes_class
from bmm.search.goal import Goal
from bmm.search.prior import prior_of
from bmm.search.space import Space
from bmm.search.study import best, run_study
from bmm.search.surrogate import Surrogate
from tests.search.problem import REFERENCE, SPACE
from tests.search.study_rows import rows_of

GOALS = {
    "worst": {"kind": "worst"},
    "geometric": {"kind": "geometric"},
    "floor": {"floor": {"*": 0.5}},
    "two": {"objectives": ["left=task0+task1", "right=task6+task7"]},
    "two and a floor": {"objectives": ["task0", "task7"], "floor": {"task3": 0.5}, "kind": "worst"},
    "five": {"objectives": [f"task{i}" for i in range(5)]},
}


def judged(rows, goal):
    """Rows of the problem with scores lifted above zero, judged by another goal."""
    lifted = [{t: max(s, 0.01) for t, s in row.scores.items()} for row in rows]
    return [replace(row, scores=s, objective=goal.value(s)) if s else row for row, s in zip(rows, lifted, strict=True)]


def engine_of(name, goal, seed=3):
    return build_engine(name, SPACE, seed, goal)


@pytest.mark.parametrize("kind", GOALS)
def test_a_suggestion_is_a_function_of_goal_seed_and_rows(kind, plain_point):
    goal = Goal.of(REFERENCE, **GOALS[kind])
    rows = judged(rows_of(SPACE, 9), goal)
    suggestion = engine_of("botorch", goal).ask(rows)
    assert not suggestion.notice
    assert all(p.low <= suggestion.point[p.name] <= p.high for p in SPACE.parameters)
    torch.manual_seed(99)
    assert engine_of("botorch", goal).ask(rows) == suggestion
    assert suggestion.point != plain_point


@pytest.fixture(scope="module")
def plain_point():
    goal = Goal.of(REFERENCE)
    return engine_of("botorch", goal).ask(judged(rows_of(SPACE, 9), goal)).point


@pytest.mark.parametrize("kind", ["worst", "two"])
def test_failed_rows_are_avoided(kind):
    goal = Goal.of(REFERENCE, **GOALS[kind])
    rows = judged(rows_of(SPACE, 9), goal)
    point = engine_of("botorch", goal).ask(rows).point
    failed = Trial(9, "search", "failed", SPACE.to_hyperparameters(point), error="OOM")
    after = engine_of("botorch", goal).ask([*rows, failed])
    assert not after.notice
    assert np.abs(SPACE.to_unit(after.point) - SPACE.to_unit(point)).max() > 1e-3


@pytest.mark.parametrize("kind", ["floor", "two", "geometric"])
def test_smooth_goals_are_modelled_by_objective_and_floors_by_task(kind):
    goal = Goal.of(REFERENCE, **GOALS[kind])
    rows = judged([r for r in rows_of(SPACE, 36) if r.status == "completed"], goal)
    outcomes = goals.outcomes_of(goal, rows)
    values = np.array([list(goal.values(r.scores).values()) for r in rows])  # (n, k)
    samples = goals._objectives(outcomes)(torch.from_numpy(outcomes.values.T))  # (n, k)
    np.testing.assert_allclose(samples.numpy(), values, rtol=1e-12)
    for row, floor in outcomes.floors.items():
        task = list(goal.floors)[list(outcomes.floors).index(row)]
        assert goal.floors[task] == floor
        np.testing.assert_allclose(outcomes.values[row], [r.scores[task] / REFERENCE[task] for r in rows])
    assert len(outcomes.values) == {"floor": 9, "two": 2, "geometric": 1}[kind]
    assert not engine_of("botorch", goal).ask(rows).notice


def test_the_worst_task_is_modelled_by_task():
    rows = judged(rows_of(SPACE, 4), goal := Goal.of(REFERENCE, kind="worst"))
    outcomes = goals.outcomes_of(goal, rows)
    assert len(outcomes.values) == 8
    samples = goals._objectives(outcomes)(torch.from_numpy(outcomes.values.T))  # (n, 1)
    np.testing.assert_allclose(samples[:, 0].numpy(), [goal.value(r.scores) for r in rows], rtol=1e-12)


def test_as_long_as_no_trial_keeps_the_floors_the_chance_of_doing_so_is_maximised():
    impossible, easy = Goal.of(REFERENCE, floor={"*": 1.4}), Goal.of(REFERENCE, floor={"*": 1e-3})
    rows = [row for row in judged(rows_of(SPACE, 9), easy) if row.status == "completed"]
    x = np.array([SPACE.to_unit(SPACE.point_of(r.hyperparameters)) for r in rows])
    names = [
        type(goals.acquisition(g, x, rows, None, prior=prior_of(SPACE), seed=0)).__name__ for g in (impossible, easy)
    ]
    assert names == ["qLogProbabilityOfFeasibility", "qLogNoisyExpectedImprovement"]
    assert not engine_of("botorch", impossible).ask(rows).notice


def test_the_posterior_of_the_processes_is_that_of_each_by_itself():
    rows = [r for r in rows_of(SPACE, 12) if r.status == "completed"]
    x = np.array([SPACE.to_unit(SPACE.point_of(r.hyperparameters)) for r in rows])
    scores = np.array([[r.scores[t] for r in rows] for t in REFERENCE])
    processes = processes_class()(x, scores, prior_of(SPACE))
    at = torch.rand(3, 2, x.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    several = processes.posterior(at)
    for k, column in enumerate(scores):
        surrogate = Surrogate(x, column, prior=prior_of(SPACE))
        for i in range(3):
            np.testing.assert_allclose(several.mean[i, :, k], surrogate.mean(at[i].numpy()), rtol=1e-6)
            for j in range(2):
                _, sd = surrogate.combination(at[i, j : j + 1].numpy(), np.ones(1))
                np.testing.assert_allclose(several.variance[i, j, k].sqrt(), sd, rtol=1e-4)
    drawn = several.rsample(torch.Size([4000]))
    assert drawn.shape == (4000, 3, 2, 8)
    error = (drawn.mean(0) - several.mean).abs() / several.variance.sqrt()
    assert error.max() < 6 / math.sqrt(4000)
    torch.testing.assert_close(drawn.var(0), several.variance, rtol=0.2, atol=0)


def test_the_reference_point_lies_below_front_and_anchor():
    values = np.array([[0.9, 0.5], [0.5, 0.9], [0.4, 0.4], [0.1, 0.2]])
    point, spread = goals.reference_point(values, values[2])
    np.testing.assert_allclose(spread, [0.5, 0.5])
    np.testing.assert_allclose(point, [0.35, 0.35])
    point, spread = goals.reference_point(values[:2], None)
    np.testing.assert_allclose(point, [0.46, 0.46])
    point, spread = goals.reference_point(np.full((3, 2), 0.7), None)
    assert (point < 0.7).all()
    assert (spread > 0).all()


@pytest.mark.parametrize("name", [n for n in ENGINES if not ENGINES[n].goals])
def test_engines_without_constraints_see_penalised_objectives(name, monkeypatch):
    goal = Goal.of(REFERENCE, floor={"*": 0.9})
    rows = judged(rows_of(SPACE, 5), goal)
    engine = engine_of(name, goal)
    assert isinstance(engine, Penalised)
    seen = []
    monkeypatch.setattr(engine.engine, "ask", seen.append)
    engine.ask(rows)
    assert seen == [[goal.penalised(row) for row in rows]]
    assert seen[0] != rows


def test_a_plain_mean_takes_the_plain_road():
    engine = engine_of("botorch", Goal.of(REFERENCE))
    assert isinstance(engine, BotorchEngine)
    assert engine.goal is None


def two_tasks(space):
    """Two tasks that pull the first coordinates apart, and a third that is good in one corner only."""

    def evaluate(hyperparameters):
        unit = space.to_unit(space.point_of(hyperparameters))
        rest = float(((unit[1:] - 0.6) ** 2).sum())
        left, right = (unit[0] - 0.15) ** 2 + rest, (unit[0] - 0.85) ** 2 + rest
        return {"left": math.exp(-2 * left), "right": math.exp(-2 * right), "corner": 1 - unit[0]}

    return evaluate


def tuned(path, space, engine, budget, seed=0, **goal):
    reference = {"left": 1.0, "right": 1.0, "corner": 1.0}
    with StudyDatabase.create(path, {}) as database:
        trials = run_study(
            database, space, two_tasks(space), reference=reference, budget=budget, seed=seed, engine=engine, **goal
        )
    kinds = {"kind" if key == "goal" else key: value for key, value in goal.items()}
    return trials, Goal.of(reference, **kinds)


def hypervolume(points, low):
    """The area that ``points`` (two objectives) dominate above ``low``."""
    area, height = 0.0, low[1]
    for x, y in sorted(points, reverse=True):
        if x > low[0] and y > height:
            area += (x - low[0]) * (y - height)
            height = y
    return area


@pytest.mark.slow
def test_a_pareto_study_finds_a_larger_front_than_sobol(tmp_path):
    space = Space.for_groups(["attention", "mlp"])
    areas = {}
    for engine in ("botorch", "sobol"):
        for seed in range(2):
            trials, goal = tuned(tmp_path / f"{engine}{seed}.db", space, engine, 24, seed, objectives=["left", "right"])
            points = [tuple(goal.values(t.scores).values()) for t in trials]
            areas[engine, seed] = hypervolume(points, (0.0, 0.0))
    # The front is unit[0] from .15 to .85 with the rest at .6; its hypervolume by quadrature.
    u = np.linspace(0.15, 0.85, 2001)
    ideal = hypervolume(list(zip(np.exp(-2 * (u - 0.15) ** 2), np.exp(-2 * (u - 0.85) ** 2), strict=True)), (0.0, 0.0))
    for seed in range(2):
        assert areas["botorch", seed] > areas["sobol", seed] + 0.1 * ideal, (areas, ideal)
        assert areas["botorch", seed] > 0.85 * ideal, (areas, ideal)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["botorch", "ax"])
def test_floors_are_kept_by_the_winner_and_bind(tmp_path, engine):
    space = Space.for_groups(["attention"])
    goal = {"floor": {"corner": 0.6}}
    trials, aim = tuned(tmp_path / "s.db", space, engine, 20, **goal)
    winner = best(trials, aim)
    free = max(two_tasks(space)(t.hyperparameters)["right"] for t in trials)
    assert winner.kind == "search"
    assert aim.violation(winner.scores) == 0
    assert free > winner.scores["right"]  # others break the floor for it
    # unit[0] = .4 keeps the floor: the constrained optimum of the mean of three
    optimum = sum((math.exp(-2 * 0.25**2), math.exp(-2 * 0.45**2), 0.6)) / 3
    assert winner.objective > 0.97 * optimum
