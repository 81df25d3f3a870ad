"""What is particular to the engines besides `botorch`, `ax` and `sobol`; their contract is in test_engine.py."""

import math
from dataclasses import replace

import cma
import numpy as np
import pytest

from bmm.records import Trial
from bmm.search.engine import build_engine
from bmm.search.engines import cma as cma_module
from bmm.search.engines import turbo
from bmm.search.engines.botorch import BotorchEngine
from bmm.search.engines.cma import POPULATION, STEP, CmaEngine, ranks
from bmm.search.engines.common import SOBOL_TRIALS, SobolEngine, quiet
from bmm.search.engines.turbo import FIRST_LENGTH, LONGEST, SUCCESSES, Region, TurboEngine, region_after
from bmm.search.space import Space
from tests.search.problem import SPACE
from tests.search.study_rows import rows_of

D = len(SPACE)


def units(rows, space=SPACE):
    return np.array([space.to_unit(space.point_of(row.hyperparameters)) for row in rows])


def row(number, objective=None, status="completed", kind="search", unit=None):
    unit = SobolEngine(SPACE, 8).unit_point(number) if unit is None else unit
    hyperparameters = SPACE.to_hyperparameters(SPACE.from_unit(unit))
    return Trial(number, kind, status, hyperparameters, objective=objective)


# CMA-ES


def test_the_replay_is_the_strategy_itself():
    """The rows of a study equal those of one strategy object that lives through all of it."""
    rows = rows_of(SPACE, 2 + 5 * POPULATION + 3, "cma", seed=4)
    assert {r.status for r in rows} == {"completed"}
    engine = CmaEngine(SPACE, 4)
    normal = cma_module._Normal()
    with quiet():
        strategy = engine._strategy(normal)
        for start in range(2, len(rows), POPULATION):
            normal.generator = engine.generator((start - 2) // POPULATION)
            drawn = strategy.ask()
            generation = rows[start : start + POPULATION]
            np.testing.assert_allclose(units(generation), drawn[: len(generation)], atol=1e-6)
            if len(generation) == POPULATION:
                strategy.tell(drawn, [-r.objective for r in generation])
    assert strategy.sigma != STEP  # it did adapt


def test_cma_starts_around_the_default():
    points = units(rows_of(SPACE, 2 + POPULATION, "cma"))
    deviations = points[2:] - points[1]
    assert 0.5 * STEP < deviations.std() < 1.5 * STEP
    assert np.abs(deviations.mean(0)).max() < 2 * STEP


def test_cma_goes_where_the_objective_rises():
    rows, target = rows_of(SPACE, 2), np.full(D, 0.8)
    engine = CmaEngine(SPACE, 0)
    for number in range(2, 80):
        unit = SPACE.to_unit(engine.ask(rows).point)
        rows.append(row(number, -float(((unit - target) ** 2).sum()), unit=unit))
    points = units(rows)
    late, start = (np.linalg.norm(mean - target) for mean in (points[-POPULATION:].mean(0), points[1]))
    assert late < 0.5 * start


def test_cma_starts_from_a_default_at_the_edge_of_the_box():
    space = Space.for_groups(["a", "b"], log10_lam=(0.0, 3.0), rho=(1.0, 2.0))
    assert space.to_unit(space.point_of(space.default())).tolist() == [0, 0, 0, 0]
    rows = rows_of(space, 20, "cma")
    assert len(np.unique(units(rows, space), axis=0)) == len(rows)
    assert not build_engine("cma", space, 0).ask(rows).notice


def test_failed_and_pending_rows_are_the_worst_of_their_generation():
    rows = [row(2, 0.5), row(3, status="failed"), row(4, 0.7), row(5, status="pending"), row(6, 0.5)]
    assert ranks(rows) == [1, 2, 0, 2, 1]
    huge = [replace(r, objective=r.objective and 1e300 * r.objective) for r in rows]
    assert ranks(huge) == ranks(rows)


def test_a_generation_of_failures_tells_nothing_and_foreign_rows_are_taken():
    rows = rows_of(SPACE, 2)
    failed = rows + [row(n, status="failed") for n in range(2, 2 + POPULATION)]
    engine = CmaEngine(SPACE, 0)
    suggestion = engine.ask(failed)
    assert not suggestion.notice
    default = units(rows)[1]
    assert np.abs(SPACE.to_unit(suggestion.point) - default).max() < 5 * STEP  # still drawn around the default
    # Good points of another engine at one corner draw the mean towards it.
    up = [row(n, 0.1 * n, unit=0.9 + 0.01 * n * np.ones(D)) for n in range(2, 8)]
    down = [row(n, 0.1 * n, unit=0.1 - 0.01 * n * np.ones(D)) for n in range(2, 8)]
    moved = [SPACE.to_unit(engine.ask(rows + told).point) for told in (up, down)]
    assert (moved[0] > moved[1] + 0.05).all()


def test_cma_takes_a_smaller_population_than_the_package_would():
    with quiet():
        assert cma.CMAEvolutionStrategy([0.5] * 12, STEP, {"verbose": -9}).popsize > POPULATION
        assert CmaEngine(SPACE, 0)._strategy(cma_module._Normal()).popsize == POPULATION


# TPE


def test_tpe_takes_pending_rows_for_bad_ones_and_failed_ones_for_none():
    rows, engine = rows_of(SPACE, 14), build_engine("tpe", SPACE, 0)

    def asked(status, unit):
        suggestion = engine.ask([*rows, row(14, status=status, unit=unit)])
        assert not suggestion.notice
        return suggestion.point

    corner, opposite = np.full(D, 0.05), np.full(D, 0.95)
    plain = asked("failed", corner)
    assert asked("failed", opposite) == plain
    beside = SPACE.to_unit(plain) + np.where(SPACE.to_unit(plain) > 0.5, -0.001, 0.001)
    assert asked("pending", beside) != plain


# TuRBO


def objectives(values, start=0):
    return [row(start + i, v) for i, v in enumerate(values)]


DESIGN = objectives([0.1, 0.5, 0.2, 0.3, 0.4])


def test_successes_in_a_row_widen_the_region_and_failures_narrow_it():
    design = region_after(DESIGN, 4)
    assert design == Region(designed=SOBOL_TRIALS, best=0.5)
    assert SUCCESSES == 3
    two = region_after(DESIGN + objectives([0.6, 0.7]), 4)
    assert (two.length, two.successes) == (FIRST_LENGTH, 2)
    three = region_after(DESIGN + objectives([0.6, 0.7, 0.8]), 4)
    assert (three.length, three.successes, three.best) == (min(2 * FIRST_LENGTH, LONGEST), 0, 0.8)
    assert region_after(DESIGN + objectives([0.6, 0.7, 0.6, 0.8]), 4).length == FIRST_LENGTH  # not in a row
    tiny = region_after(DESIGN + objectives([0.5001]), 4)
    assert (tiny.failures, tiny.best) == (1, 0.5001)  # too small to be a success
    assert region_after(DESIGN + objectives([0.1] * 3), 4).length == FIRST_LENGTH
    assert region_after(DESIGN + objectives([0.1] * 4), 4).length == FIRST_LENGTH / 2


def test_failed_rows_count_against_the_region_and_pending_ones_do_not():
    failed, pending = row(9, status="failed"), row(9, status="pending")
    assert region_after([*DESIGN, failed], 4).failures == 1
    assert region_after([*DESIGN, pending], 4) == region_after(DESIGN, 4)
    assert region_after([failed, pending], 4).designed == 0
    assert region_after([row(0, 0.9, kind="anchor"), *DESIGN], 4) == Region(designed=5, best=0.9)


def collapsed(tolerance):
    """Rows at whose end the region is given up: seven halvings' worth of failures from .8."""
    halvings = math.floor(math.log2(FIRST_LENGTH / turbo.SHORTEST)) + 1
    return DESIGN + objectives([0.05] * (halvings * tolerance), start=len(DESIGN))


def test_a_collapsed_region_is_followed_by_a_fresh_design():
    tolerance = turbo.failures_tolerated(D)
    rows = collapsed(tolerance)
    assert region_after(rows[:-1], tolerance).length < 2 * turbo.SHORTEST
    assert region_after(rows, tolerance) == Region(start=len(rows))
    engine, sobol = TurboEngine(SPACE, 0), SobolEngine(SPACE, 0)
    for number in range(len(rows), len(rows) + SOBOL_TRIALS):
        assert engine.ask(rows) == sobol.ask(rows)
        rows.append(row(number, 0.05 + 0.001 * number))
    suggestion = engine.ask(rows)
    assert not suggestion.notice
    assert suggestion != sobol.ask(rows)
    # It looks around the fresh region's best point, though the abandoned one had a better.
    unit, length = SPACE.to_unit(suggestion.point), FIRST_LENGTH
    fresh = units(rows[-SOBOL_TRIALS:])
    model = engine.model(0, fresh, rows[-SOBOL_TRIALS:])
    low, high = engine.box(model, fresh, rows[-SOBOL_TRIALS:])
    assert ((low - 1e-6 <= unit) & (unit <= high + 1e-6)).all()
    half = np.exp(-np.log(model.inverse[:, 0].numpy()).mean(0))
    np.testing.assert_allclose(np.prod(half / np.exp(np.log(half).mean())), 1)
    expected = np.clip(fresh[-1] + 0.5 * length * half / np.exp(np.log(half).mean()), 0, 1)
    np.testing.assert_allclose(high, expected)


def test_a_fresh_region_of_stopped_rows_alone_is_modelled_too():
    rows = collapsed(turbo.failures_tolerated(D))
    begun = len(rows)
    for number in range(begun, begun + SOBOL_TRIALS + 1):
        rows.append(replace(row(number, 0.05 + 0.001 * number, status="stopped"), scores={"a": 0.1}))
    suggestion = TurboEngine(SPACE, 0).ask(rows)
    assert not suggestion.notice
    assert suggestion != SobolEngine(SPACE, 0).ask(rows)


def test_turbo_stays_near_the_best_point_where_its_parent_does_not_have_to():
    rows = rows_of(SPACE, 10)
    small = [r for r in rows if r.status == "completed"]
    tolerance = turbo.failures_tolerated(D)
    small += [row(10 + i, 0.01, unit=SobolEngine(SPACE, 5).unit_point(i)) for i in range(3 * tolerance)]
    region = region_after(small, tolerance)
    assert region.length <= FIRST_LENGTH / 4
    engine = TurboEngine(SPACE, 0)
    points, best = units(small), int(np.argmax([r.objective for r in small]))
    model = BotorchEngine(SPACE, 0).model(0, points, small)
    low, high = engine.box(model, points, small)
    assert ((low <= points[best]) & (points[best] <= high)).all()
    assert (high - low).min() < 0.5
    suggestion = engine.ask(small)
    assert not suggestion.notice
    unit = SPACE.to_unit(suggestion.point)
    assert ((low - 1e-6 <= unit) & (unit <= high + 1e-6)).all()


@pytest.mark.parametrize(("d", "rows"), [(6, 4), (12, 4), (18, 5), (60, 15)])
def test_more_parameters_need_more_failures(d, rows):
    assert turbo.failures_tolerated(d) == rows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cma", "tpe"])
def test_engines_without_a_gaussian_process_beat_sobol_in_twelve_dimensions(name):
    space = Space.for_groups([f"g{i}" for i in range(6)])

    def best(rows):
        return max(r.objective for r in rows if r.status == "completed")

    start, optimum = best(rows_of(space, 2)), 1 / (1 + np.exp(-3))
    gains = np.array([[best(rows_of(space, 50, e, s)) for e in (name, "sobol")] for s in range(4)])
    gains = (gains - start) / (optimum - start)  # (seeds, engines)
    assert gains[:, 0].mean() > gains[:, 1].mean() + 0.15, gains
