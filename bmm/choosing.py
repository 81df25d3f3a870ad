"""The final choice of a run: finalists raced on held-out validation inputs, each score kept in the study's database."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .evaluation import judged_by_experts, score_tasks
from .merging import PreparedModel
from .records import Choice, Trial
from .run import Run
from .search.choice import ROUNDS, Array, choose
from .search.database import StudyDatabase
from .search.goal import Goal
from .search.space import Space


def choose_trial(
    run: Run, prepared: PreparedModel, trials: Sequence[Trial], space: Space, goal: Goal, database: StudyDatabase
) -> tuple[Trial, Choice | None]:
    """The winner by the recipe's ``choice``, ``holdout`` and ``finalists``, and how it was found.

    None for the second where the best observed score decides. A trial's held-out scores are committed as soon as they
    are measured: a race that was interrupted goes on where it was.
    """
    recipe = run.recipe
    inputs = {score.task: score.n for score in run.score_experts("validation")}
    held_out = HeldOut(run, prepared, database) if run.held else None
    entries = recipe.finalists * ROUNDS
    winner, choice = choose(
        trials,
        space,
        goal,
        method=recipe.choice,
        inputs=inputs,
        seed=recipe.seed,
        finalist_count=recipe.finalists if held_out else 1,
        share=recipe.holdout,
        measure=held_out,
    )
    if held_out:
        run.progress("race", entries, entries)
    return winner, None if choice.method == "observed" and not choice.candidates else choice


class HeldOut:
    """Scores trials on the held-out inputs, or reads what an earlier call or process measured."""

    def __init__(self, run: Run, prepared: PreparedModel, database: StudyDatabase) -> None:
        self.run, self.prepared, self.database = run, prepared, database
        self.kept = database.held_out()
        tasks = {task.name: task for task in run.held}
        if run.recipe.score_by == "agreement":
            tasks = judged_by_experts(run.held, run.pool.experts, run.outputs)
        self.tasks, self.done = tasks, 0

    def __call__(self, trial: Trial, names: Sequence[str]) -> dict[str, Array]:
        """One number an input, by task."""
        missing = [self.tasks[name] for name in names if (trial.number, name) not in self.kept]
        if missing:
            found: dict[str, list[float]] = {task.name: [] for task in missing}

            def keep(task: str, scores: Tensor) -> None:
                found[task] += scores.double().tolist()

            score_tasks(tasks=missing, each=keep, **self.run.loaded(self.prepared.merge(trial.hyperparameters)))
            self.database.keep_held_out(trial.number, found)
            self.kept |= {(trial.number, task): scores for task, scores in found.items()}
        self.done += 1
        most = self.run.recipe.finalists * ROUNDS
        self.run.progress("race", min(self.done, most - 1), most, f"trial {trial.number}")
        return {name: np.array(self.kept[trial.number, name]) for name in names}
