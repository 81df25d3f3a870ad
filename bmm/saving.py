"""Any trial of a study as a checkpoint: the point of a Pareto front that was chosen, or a runner-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .checkpoint.atomic import destination
from .errors import RecipeError
from .evaluation import Task
from .loading import ModelBuilder
from .notation import StateDict
from .opening import open_run, require_same_inputs, targets
from .progress import Progress, silent
from .recipe import Recipe
from .records import Score, StudyResult, Trial
from .report import study_card
from .run import Run
from .search.database import StudyDatabase
from .statistics import anchor_needs
from .tuning import load_result, study_file
from .writing import write_model

KEYS = ("device", "cache", "dtype", "shard_gib", "adapter_rank")
"""The recipe keys that may be given anew: none of them changes what is merged."""


def save(
    study: str | Path,
    trial: int | None = None,
    *,
    out: str | Path,
    overwrite: bool = False,
    tasks: Sequence[Task] | str | None = None,
    model: ModelBuilder | str | None = None,
    progress: Progress = silent,
    **keys: Any,
) -> Path:
    """Merge as one trial of a study did and write checkpoint, card and recipe to ``out``; returns that folder.

    Args:
        study: a run's folder, or its study file; finished, interrupted or running.
        trial: its number; without, the study's best.
        tasks, model: as given to `bmm.tune`, where they were objects and not in the recipe.
        keys: device, cache, dtype, shard_gib or adapter_rank in place of the recipe's.

    Raises:
        RecipeError: no such trial, one that is not completed, or a key that would change the merge.
        StudyError: no study there, or its checkpoints have changed; further errors as `bmm.merge`.
    """
    destination(out, overwrite)
    run, tensors, found = merged_trial(study, trial, tasks=tasks, model=model, progress=progress, **keys)
    command = f"bmm save {study_file(study).parent} --trial {found.best.number} --out {Path(out).name}"
    return write_model(run, tensors, Path(out), study_card(found, run.recipe.to_yaml(), command), overwrite=overwrite)


def merged_trial(
    study: str | Path,
    trial: int | None = None,
    *,
    tasks: Sequence[Task] | str | None = None,
    model: ModelBuilder | str | None = None,
    progress: Progress = silent,
    **keys: Any,
) -> tuple[Run, StateDict, StudyResult]:
    """The run of a study, one trial's merged tensors, and the result as if that trial had won; arguments as `save`."""
    if changed := sorted(set(keys) - set(KEYS)):
        raise RecipeError(f"{changed[0]} cannot change: the trial is merged as it was", f"only {', '.join(KEYS)} can")
    result = load_result(study)
    chosen = _chosen(result, trial)
    raw = {k: v for k, v in result.recipe.items() if k != "out"}
    recipe = Recipe.from_dict({**raw, **keys, **targets(tasks, model)}).relative_to(Path.cwd())
    needs_tasks = bool(anchor_needs(recipe.anchor)) or recipe.grams != "datafree"
    run = open_run(recipe, tasks, model, progress, need_tasks=needs_tasks)
    with StudyDatabase.open(study_file(study), readonly=True) as database:
        require_same_inputs(database, run.pool.fingerprint())
    return run, run.prepare().merge(chosen.hyperparameters), _of_trial(result, chosen)


def _chosen(result: StudyResult, number: int | None) -> Trial:
    if number is None:
        return result.best
    rows = {t.number: t for t in result.trials}
    if number not in rows:
        raise RecipeError(f"the study has no trial {number}", f"trials 0 to {max(rows)}; see `bmm report --trials`")
    if rows[number].status != "completed":
        why = f": {rows[number].error}" if rows[number].error else ""
        raise RecipeError(f"trial {number} is {rows[number].status}{why}", "choose a completed trial")
    return rows[number]


def _of_trial(result: StudyResult, trial: Trial) -> StudyResult:
    """The result as if this trial had won; only the winner has test scores, others their validation scores."""
    if trial.number == result.best.number:
        return result
    counts = {s.task: s.n for s in result.validation["experts"]}
    own = [Score(task, trial.scores[task], n) for task, n in counts.items()]
    return replace(result, best=trial, validation={**result.validation, "best": own}, test={})
