"""Rows of a study in memory, without a database."""

import math

from bmm.records import Trial
from bmm.search.engine import build_engine
from tests.search.problem import REFERENCE, evaluate


def rows_of(space, count, engine="sobol", seed=0):
    """Anchor, default, then the engine's trials on `problem.evaluate`; those that raise are failed."""
    suggester, rows = build_engine(engine, space, seed), []
    for number in range(count):
        if number < 2:
            kind, hyperparameters = (("anchor", space.anchor()), ("default", space.default()))[number]
        else:
            kind, hyperparameters = "search", space.to_hyperparameters(suggester.ask(rows).point)
        try:
            scores = evaluate(hyperparameters, space)
        except RuntimeError as error:
            rows.append(Trial(number, kind, "failed", hyperparameters, error=str(error)))
            continue
        objective = math.fsum(scores[t] / REFERENCE[t] for t in REFERENCE) / len(REFERENCE)
        rows.append(Trial(number, kind, "completed", hyperparameters, scores, objective))
    return rows
