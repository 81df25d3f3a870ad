"""A cheap deterministic stand-in for a merge: eight tasks, each with an optimum of its own; also run as a script.

As a script it runs or resumes a study: ``python problem.py study.db engine budget pause``.
"""

import math
import sys
import time
from pathlib import Path

from bmm.errors import StudyError
from bmm.search.database import StudyDatabase
from bmm.search.space import Space
from bmm.search.study import run_study

SPACE = Space.for_groups(["attention", "mlp", "patch"])
REFERENCE = {f"task{t}": 0.8 + 0.02 * t for t in range(8)}


def evaluate(hyperparameters, space=SPACE):
    """Sigmoids of quadratics around optima near unit coordinates .15 and .85, far from the default; ripples on top."""
    unit = space.to_unit(space.point_of(hyperparameters))
    scores = {}
    for t, task in enumerate(REFERENCE):
        optima = [(0.15 if i % 2 else 0.85) + 0.06 * math.sin(7 * i + 3 * t) for i in range(len(unit))]
        distance = sum((1 + i % 3) * (u - o) ** 2 for i, (u, o) in enumerate(zip(unit, optima, strict=True)))
        scores[task] = REFERENCE[task] / (1 + math.exp(2 * distance - 3)) + 0.002 * math.sin(40 * unit[t % len(unit)])
    if 0.2 < unit[0] < 0.25:
        raise RuntimeError("this corner does not fit in memory")
    return scores


def outcomes(trials):
    """All of the rows but their timings."""
    return [(t.number, t.kind, t.status, t.hyperparameters, t.scores, t.objective, t.error) for t in trials]


def command(path, engine, budget, pause):
    """What runs or resumes a study in a process of its own, from the root of the repository."""
    return [sys.executable, "-m", "tests.search.problem", str(path), engine, str(budget), str(pause)]


def rows_on_disk(path):
    """The rows of a study whose process may have been killed at any moment."""
    try:
        with StudyDatabase.open(path, readonly=True) as database:
            return database.trials()
    except StudyError as error:  # killed before the file was created or its tables committed
        if "no study at" in error.message or "is not a study" in error.message:
            return []
        raise


def main(path, engine, budget, pause):
    def slowly(hyperparameters):
        print("evaluating", flush=True)
        time.sleep(pause)
        return evaluate(hyperparameters)

    try:
        database = StudyDatabase.create(path, {"recipe": {"anchor": "problem"}})
    except StudyError:
        database = StudyDatabase.open(path)
    with database:
        run_study(database, SPACE, slowly, reference=REFERENCE, budget=budget, seed=5, engine=engine)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
