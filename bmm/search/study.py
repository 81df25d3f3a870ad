"""The loop of a study: anchor, default, then whatever the engine suggests, one committed row at a time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from bmm.errors import RecipeError, StudyError
from bmm.records import Trial, TrialKind
from bmm.search.database import StudyDatabase
from bmm.search.engine import Engine, build_engine
from bmm.search.executor import Evaluate, Executor, InProcess, Job, work_through
from bmm.search.goal import PLAIN, Goal, check_stopping
from bmm.search.refine import Coarse, Refined, plan
from bmm.search.space import Space
from bmm.search.stopping import Stopper

OnTrial = Callable[[Trial, Trial | None], None]

_IDENTITY = "search"


def run_study(
    database: StudyDatabase,
    space: Space,
    evaluate: Evaluate | Executor,
    *,
    reference: Mapping[str, float],
    budget: int,
    seed: int,
    engine: str = "botorch",
    weights: Mapping[str, float] | None = None,
    goal: str = "mean",
    floor: Mapping[str, float] | None = None,
    objectives: Sequence[str] = (),
    early_stopping: float = 0.0,
    refine: Sequence[Coarse] = (),
    objective_name: str = "labels",
    on_trial: OnTrial | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[Trial]:
    """Runs a new study, or goes on with the one in ``database``, until it has ``budget`` trials; returns all of them.

    ``evaluate`` maps hyperparameters to one validation score a task (higher is better); ``reference`` gives each
    task's score of its own expert. The objective, maximised, is a mean over tasks of score / reference, weighted by
    ``weights`` where given; ``goal``, ``floor`` and ``objectives`` say which (`bmm.search.goal`), ``objective_name``
    what kind of scores they are. Trial 0 is the anchor and trial 1 the default; both, and failed trials, count in the
    budget. Trials left pending by a killed run are evaluated again under their number before anything else.

    With ``early_stopping`` above zero a trial's tasks are read from the mapping one by one, in an order of its own,
    and the trial is stopped where the probability that it becomes the best falls below that value
    (`bmm.search.stopping`): give a mapping that scores a task when it is read.

    ``evaluate`` may also be an `Executor`, whose workers evaluate several trials at a time. Suggestions are then made
    while others are pending, and which rows they see depends on the order in which trials end. A trial whose worker is
    lost is evaluated again under its number, and fails where that happens twice.

    With ``refine``, nested coarsenings of the space's groups (`bmm.groups.coarser_groups`), the search goes through
    stages (`bmm.search.refine`); where these begin is settled by the budget the study is begun with.

    An `Exception` from ``evaluate``, a missing task or a score that is not finite fails the trial, not the study.
    KeyboardInterrupt and SystemExit pass through and leave the trial pending. ``on_trial(trial, best so far)`` follows
    each evaluation; ``should_stop`` is asked before each, and lets those that run come to their end.

    Raises `RecipeError` for a reference, weight, goal, budget or engine that makes no sense, `StudyError` where the
    database holds another search (another seed, space, reference, goal, engine, ...) or where anchor and default both
    failed.
    """
    aim = Goal.of(reference, weights, goal, floor, objectives)
    if budget < 1:
        raise RecipeError(f"a budget of {budget} trials", "at least 1: trial 0 is the anchor")
    if seed < 0:
        raise RecipeError(f"seed {seed} is negative", "take a whole number from 0 up")
    check_stopping(early_stopping, goal, floor or {}, objectives)

    def build(tied: Space) -> Engine:
        return build_engine(engine, tied, seed, aim)

    suggester, staged = build(space), dict[str, Any]()
    if refine:
        stages = plan(refine, space.groups, budget, database.meta().get(_IDENTITY, {}).get("refine"))
        suggester, staged = Refined(space, stages, aim, build), {"refine": [stage.to_json() for stage in stages]}
    stopper = Stopper(aim.coefficients(), seed, early_stopping) if early_stopping else None
    _claim(
        database,
        {"seed": seed, "engine": engine, "space": space.to_json(), **aim.to_json(), "objective": objective_name}
        | ({"early_stopping": early_stopping} if early_stopping else {})
        | staged,
    )
    trials = database.trials()
    if len(trials) > budget:
        raise StudyError(
            f"{database.path} already holds {len(trials)} trials, the budget is {budget}",
            "a study can be continued with a larger budget, not cut short",
        )
    waiting = [t for t in trials if t.status == "pending"]

    def following() -> Trial | None:
        _refuse_dead_start(trials, database)
        if waiting:
            return waiting.pop(0)
        if len(trials) >= budget:
            return None
        trials.append(_begin(database, suggester, space, trials))
        return trials[-1]

    def job(trial: Trial) -> Job:
        seen = [t for t in trials if t.status == "completed"] if stopper else []
        return partial(_evaluated, trial, goal=aim, stopper=stopper, trials=seen)

    def finish(outcome: Trial) -> None:
        database.finish(outcome)
        trials[[t.number for t in trials].index(outcome.number)] = outcome
        if on_trial is not None:
            on_trial(outcome, best(trials, aim) if any(t.status == "completed" for t in trials) else None)

    executor = evaluate if isinstance(evaluate, Executor) else InProcess(evaluate)
    work_through(executor, following, job, finish, should_stop)
    return trials


def best(trials: Sequence[Trial], goal: Goal | None = None) -> Trial:
    """The completed trial with the highest objective, the earliest of equals: never below the anchor, if that ran.

    Where ``goal`` has floors, the best of the trials that keep them; where none does, the one that misses them least.
    """
    completed = [t for t in trials if t.status == "completed" and t.objective is not None]
    if not completed:
        raise StudyError("no trial of the study is completed", "resume it, or read its trials' errors")
    return max(completed, key=goal.rank if goal else lambda t: (t.objective, -t.number))


def _begin(database: StudyDatabase, suggester: Engine, space: Space, trials: Sequence[Trial]) -> Trial:
    number, notice, started = len(trials), "", time.perf_counter()
    kind: TrialKind
    if number == 0:
        kind, hyperparameters = "anchor", space.anchor()
    elif number == 1:
        kind, hyperparameters = "default", space.default()
    else:
        suggestion = suggester.ask(trials)
        kind, hyperparameters, notice = "search", space.to_hyperparameters(suggestion.point), suggestion.notice
    trial = Trial(number, kind, "pending", hyperparameters, suggest_seconds=time.perf_counter() - started)
    database.begin(trial, notice)
    return trial


def _evaluated(
    trial: Trial, evaluate: Evaluate, goal: Goal, stopper: Stopper | None = None, trials: Sequence[Trial] = ()
) -> Trial:
    started = time.perf_counter()
    try:
        found = evaluate(trial.hyperparameters)
        if wrong := sorted(found.keys() ^ goal.reference.keys()):
            raise ValueError(f"scores and tasks do not agree on {', '.join(wrong)}")
        if stopper is not None:
            found, forecast = stopper.scores(trial, trials, found)
            if forecast is not None:
                seconds = time.perf_counter() - started
                return replace(trial, status="stopped", scores=found, objective=forecast.mean, seconds=seconds)
        scores = {task: float(value) for task, value in found.items()}
        if bad := {task: value for task, value in scores.items() if not math.isfinite(value)}:
            raise ValueError(f"score not finite: {', '.join(f'{t} {v}' for t, v in sorted(bad.items()))}")
        value = goal.value(scores)
        if not math.isfinite(value):
            raise ValueError(f"objective not finite: {value}")
    except Exception as error:  # a trial may fail in any way its evaluation can; the study goes on
        return replace(
            trial, status="failed", error=f"{type(error).__name__}: {error}", seconds=time.perf_counter() - started
        )
    return replace(trial, status="completed", scores=scores, objective=value, seconds=time.perf_counter() - started)


def _claim(database: StudyDatabase, identity: dict[str, Any]) -> None:
    """Records what the suggestions and objectives depend on, or refuses to mix two searches in one study."""
    recorded = database.meta().get(_IDENTITY)
    if recorded is None:
        database.set_meta(_IDENTITY, identity)
        return
    recorded = PLAIN | {"objective": "labels"} | recorded  # studies that are older than the choice
    identity = json.loads(json.dumps(identity))
    if changed := [key for key in identity | recorded if identity.get(key) != recorded.get(key)]:
        key = changed[0]
        told = key in ("seed", "engine", "objective", "goal")
        detail = f": {recorded.get(key)} there, {identity.get(key)} here" if told else ""
        raise StudyError(
            f"{database.path} was begun with another {' and '.join(changed)}{detail}",
            "resume with the original recipe (only the budget may grow), or start a new study",
        )


def _refuse_dead_start(trials: Sequence[Trial], database: StudyDatabase) -> None:
    start = trials[:2]
    if len(start) == 2 and all(t.status == "failed" for t in start):
        raise StudyError(
            f"anchor and default both failed, so {database.path} cannot go on: {start[0].error}",
            "mend the cause and start a new study",
        )
