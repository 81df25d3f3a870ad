"""Rows of studies whose answers are known."""

import numpy as np
from scipy.stats import qmc

from bmm.records import Trial
from bmm.search.database import StudyDatabase
from bmm.search.space import Space
from bmm.search.study import run_study
from tests.search.problem import REFERENCE, SPACE, evaluate

GROUPS = Space.for_groups(["attention", "mlp", "patch"])


def sobol_points(n, d, seed=0):
    """The first ``n`` points of a scrambled sequence: (n, d)."""
    return qmc.Sobol(d, seed=np.random.default_rng(seed)).random_base2(n.bit_length())[:n]


def rows_at(space, units, function):
    """Anchor, default, then a completed trial at each unit point; two tasks whose mean is ``function(unit)``."""
    start = [space.to_unit(space.point_of(h)) for h in (space.anchor(), space.default())]
    rows = []
    for number, unit in enumerate([*start, *units]):
        kind = ("anchor", "default")[number] if number < 2 else "search"
        hyperparameters = space.anchor() if number == 0 else space.to_hyperparameters(space.from_unit(unit))
        value = function(unit)
        scores = {"one": 0.5 * (value + 0.1), "two": 0.25 * (value - 0.1)}
        rows.append(Trial(number, kind, "completed", hyperparameters, scores, value))
    return rows


EXPERTS = {"one": 0.5, "two": 0.25}


def killed_study(folder, budget, kill_at):
    """A study on disk whose run ended in the evaluation of trial ``kill_at``."""
    folder.mkdir()
    count = iter(range(budget))

    def interrupted(hyperparameters):
        if next(count) == kill_at:
            raise KeyboardInterrupt
        return evaluate(hyperparameters)

    with StudyDatabase.create(folder / "study.db", {"recipe": {"budget": budget}}) as database:
        try:
            run_study(database, SPACE, interrupted, reference=REFERENCE, budget=budget, seed=5, engine="sobol")
        except KeyboardInterrupt:
            return folder
    raise AssertionError("the study was not interrupted")
