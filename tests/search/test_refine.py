import pytest

from bmm.errors import StudyError
from bmm.groups import coarser_groups, search_groups
from bmm.records import Trial
from bmm.search.database import StudyDatabase
from bmm.search.engine import build_engine
from bmm.search.goal import Goal
from bmm.search.refine import Refined, Stage, plan
from bmm.search.space import Space
from bmm.search.study import run_study
from tests.search import problem
from tests.search.problem import REFERENCE, outcomes

GROUPS = ["a.0", "a.1", "b.0", "b.1"]
SPACE = Space.for_groups(GROUPS).extended(gamma=0.5)
ALL, ROLES = dict.fromkeys(GROUPS, "all"), {g: g[0] for g in GROUPS}
PLAIN = {"reference": REFERENCE, "seed": 3, "engine": "sobol", "refine": [ALL, ROLES]}


def evaluate(hyperparameters):
    return problem.evaluate(hyperparameters, SPACE)


def study(path, budget=20, stop_after=None, **changes):
    database = StudyDatabase.open(path) if path.exists() else StudyDatabase.create(path, {})
    with database:
        stop = None if stop_after is None else lambda: len(database.trials()) >= stop_after
        return run_study(database, SPACE, evaluate, budget=budget, should_stop=stop, **{**PLAIN, **changes})


def firsts(path):
    with StudyDatabase.open(path, readonly=True) as database:
        return [first for first, _ in database.meta()["search"]["refine"]]


def tied(trials, coarse):
    """Whether each trial gives the groups of a coarse group one pair."""
    pairs = [{(coarse[g], t.hyperparameters.lam[g], t.hyperparameters.rho[g]) for g in GROUPS} for t in trials]
    return [len(found) == len(set(coarse.values())) for found in pairs]


def test_stages_untie_groups_one_after_the_other(tmp_path):
    trials = study(tmp_path / "s.db")
    assert firsts(tmp_path / "s.db") == [0, 4, 12]
    assert all(tied(trials[:4], ALL))
    assert not any(tied(trials[4:], ALL))
    assert all(tied(trials[4:12], ROLES))
    assert not any(tied(trials[12:], ROLES))
    assert len({t.hyperparameters.gamma for t in trials[2:]}) == 18  # what has no group is searched in every stage


@pytest.mark.parametrize("engine", ["sobol", "cma"])
def test_a_stage_interrupted_anywhere_goes_on_as_if_nothing_had_happened(tmp_path, engine):
    if engine != "sobol":
        pytest.importorskip(engine)
    whole = study(tmp_path / "whole.db", engine=engine)
    for stop in (3, 4, 5, 12, 17):
        study(tmp_path / "cut.db", engine=engine, stop_after=stop)
    assert outcomes(study(tmp_path / "cut.db", engine=engine)) == outcomes(whole)


def test_a_larger_budget_keeps_the_stages_the_study_began_with(tmp_path):
    path = tmp_path / "s.db"
    short = study(path, budget=10)
    long = study(path, budget=30)
    assert outcomes(long[:10]) == outcomes(short)
    assert firsts(path) == [0, 2, 6]
    assert not any(tied(long[6:], ROLES))


def test_a_study_does_not_change_its_stages(tmp_path):
    path = tmp_path / "s.db"
    study(path, budget=5)
    for other in ([], [ALL], [ALL, {**ROLES, "b.1": "a"}]):
        with pytest.raises(StudyError, match="begun with another refine"):
            study(path, budget=10, refine=other)


def test_a_stage_sees_all_rows_starts_from_the_best_and_has_a_first_design():
    seen = []

    class Spy:
        def __init__(self, space):
            self.space = space

        def ask(self, rows):
            seen.append((self.space, rows))
            return build_engine("sobol", self.space, 0).ask(rows)

    stages = plan([ALL, ROLES], GROUPS, 20)
    refined = Refined(SPACE, stages, Goal.of(REFERENCE), Spy)
    objectives = [0.1, 0.2, 0.5, 0.4, 0.3, 0.6, 0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.95]
    rows = [Trial(0, "anchor", "completed", SPACE.anchor(), REFERENCE, objectives[0])]
    rows += [Trial(1, "default", "completed", SPACE.default(), REFERENCE, objectives[1])]
    while len(rows) < len(objectives):
        point = SPACE.to_hyperparameters(refined.ask(rows).point)
        rows.append(Trial(len(rows), "search", "completed", point, REFERENCE, objectives[len(rows)]))
    refined.ask(rows)
    assert [len(space) for space, _ in seen] == [3] * 2 + [5] * 8 + [9] * 2
    assert [[t.kind for t in given].count("search") for _, given in seen] == [0, 1, *range(8), 0, 1]
    starts = [rows[1]] * 2 + [rows[2]] * 8 + [rows[6]] * 2  # trial 12 is better still, but of the stage itself
    for (space, given), start in zip(seen, starts, strict=True):
        stage = stages[[3, 5, 9].index(len(space))]
        assert space.point_of(space.default()) == pytest.approx(
            space.point_of(stage.project(start).hyperparameters), abs=1e-9
        )
        assert [t.objective for t in given] == objectives[: len(given)]
        assert [t.hyperparameters for t in given] == [stage.project(t).hyperparameters for t in rows[: len(given)]]


def test_a_tied_space_has_the_start_for_default_and_its_points_embed():
    stage = Stage(0, ROLES)
    start = SPACE.to_hyperparameters(
        stage.embed({"log10_lam/a": 1.0, "rho/a": 0.9, "log10_lam/b": -2.0, "rho/b": 1.2, "gamma": 0.25}, SPACE)
    )
    assert start.rho == {"a.0": 0.9, "a.1": 0.9, "b.0": 1.2, "b.1": 1.2}
    space = stage.space(SPACE, start)
    row = stage.project(Trial(5, "search", "pending", start))
    assert space.groups == ["a", "b"]
    assert space.point_of(row.hyperparameters) == pytest.approx(space.point_of(space.default()))
    assert stage.embed(space.point_of(row.hyperparameters), SPACE) == SPACE.point_of(start)
    assert Stage.from_json(stage.to_json()) == stage


WEIGHTS = [f"blocks.{b}.attn.{role}.weight" for b in range(4) for role in "qkvo"] + ["stem.conv1.weight"]


def coarser(scheme, **overrides):
    return coarser_groups(search_groups(WEIGHTS, scheme, 2, overrides), scheme, overrides)


def test_coarser_groups_are_nested():
    assert [len(set(c.values())) for c in coarser("bands")] == [1, 5]
    assert coarser("bands")[1]["q.0"] == coarser("bands")[1]["q.1"] == "q"
    assert [len(set(c.values())) for c in coarser("module")] == [1, 5]
    assert [len(set(c.values())) for c in coarser("role")] == [1]
    assert [len(set(c.values())) for c in coarser("depth")] == [1]
    joined = coarser("bands", **{"blocks.3.attn.[qk].weight": "late"})[1]
    assert {joined[g] for g in ("q.0", "q.1", "k.0", "k.1")} == {"k", "q"}
    assert joined["late"] == "late"
    crossed = coarser("bands", **{"blocks.[01].attn.[qk].weight": "v.0"})[1]  # a group that holds two roles and more
    assert crossed["v.0"] == crossed["v.1"] == "v+v.0"
