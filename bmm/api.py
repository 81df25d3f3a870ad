"""What ``import bmm`` offers: thin functions over the parts.

Every function takes a `Recipe`, or the recipe's keys as keyword arguments, or both (keywords win).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checkpoint import ModelPool
from .checkpoint.atomic import destination
from .errors import RecipeError, StudyError, did_you_mean
from .evaluation import Task
from .grams import TaskGrams
from .loading import ModelBuilder
from .masking import merge_masked, reconstruct
from .memory import require_memory
from .mergekit import merge_mergekit
from .notation import StateDict
from .opening import open_run, targets
from .posterior import calibrate
from .progress import Progress, silent
from .rebasin import Aligner, Alignment, Options, Spec
from .recipe import Recipe
from .records import Hyperparameters, Score, StudyResult
from .report import merge_card
from .saving import merged_trial, save
from .search.database import StudyDatabase
from .search.goal import Goal
from .search.space import Space
from .solver import check_scalars
from .statistics import anchor_needs
from .trajectory import average
from .tuning import RESUMABLE, OnTrial, load_result, study_file, tune_recipe
from .writing import streamed_merge, write_stream
from .yaml_file import by_name

if TYPE_CHECKING:
    from .analysis import Analysis


def make_recipe(recipe: Recipe | Mapping[str, Any] | str | Path | None = None, **keys: Any) -> Recipe:
    """A checked recipe from a `Recipe`, a mapping, a YAML file's path, or nothing, with ``keys`` on top."""
    if isinstance(keys.get("experts"), list | tuple):
        keys["experts"] = by_name("expert", ((Path(p).stem, str(p)) for p in keys["experts"]))
    if isinstance(recipe, str | Path):
        return Recipe.load(recipe, **keys)
    given = recipe.to_dict() if isinstance(recipe, Recipe) else dict(recipe or {})
    return Recipe.from_dict(given | keys)


def tune(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    tasks: Sequence[Task] | str | None = None,
    model: ModelBuilder | str | None = None,
    resume: str | Path | None = None,
    progress: Progress = silent,
    on_trial: OnTrial | None = None,
    should_stop: Callable[[], bool] | None = None,
    **keys: Any,
) -> StudyResult:
    """Tune a merge: search (lam, rho) of every module group on validation data; write and return the best.

    Args:
        recipe: a `Recipe`, a mapping of its keys, or a YAML file; none and no ``base``: the embedded zoo.
        tasks: `Task` objects (one an expert, by the same names), or FILE.py:FUNCTION.
        model: a function that builds the ``nn.Module``, or FILE.py:FUNCTION.
        resume: folder of a study to continue; its own recipe applies, but for the keys in `bmm.tuning.RESUMABLE`.
        on_trial: called with each finished trial and the best so far.
        should_stop: asked before each trial; True ends the search and writes the best so far.
        keys: recipe keys, e.g. ``anchor="tsv", budget=50``.

    Raises:
        RecipeError, CheckpointError, GramError, MergeError, StudyError: see `bmm.errors`.
    """
    if resume is not None:
        fixed = sorted(set(keys) - set(RESUMABLE))
        if recipe is not None or fixed:
            raise RecipeError(
                f"{fixed[0] if fixed else 'the recipe'} cannot change in a resumed study",
                f"only {', '.join(RESUMABLE)} can; start a new study for anything else",
            )
        path = study_file(resume)
        with StudyDatabase.open(path, readonly=True) as database:
            given = database.meta()["recipe"]
        # The folder may have been moved since; where it is now is what counts.
        chosen = make_recipe(given, **keys, out=str(path.parent))
    else:
        chosen = make_recipe(recipe, **keys, **targets(tasks, model))
    return tune_recipe(
        chosen,
        tasks=None if isinstance(tasks, str) else tasks,
        model=None if isinstance(model, str) else model,
        resume=resume is not None,
        progress=progress,
        on_trial=on_trial,
        should_stop=should_stop,
    )


def merge(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    lam: float | Mapping[str, float] | None = None,
    rho: float | Mapping[str, float] = 1.0,
    study: str | Path | None = None,
    trial: int | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    masks: bool = False,
    tasks: Sequence[Task] | str | None = None,
    model: ModelBuilder | str | None = None,
    progress: Progress = silent,
    **keys: Any,
) -> StateDict | Path:
    """One merge: plain (the anchor alone), BMM at given hyperparameters, or a trial of a study.

    Args:
        lam, rho: BMM with these hyperparameters, one number for all groups or one a group. Without ``lam`` and
            ``study`` the anchor method itself is the merge, streamed tensor by tensor.
        study, trial: merge as in this trial of a study (default: its best); see `save`.
        out: write a checkpoint there and return its path; otherwise return the tensors (float32).
        masks: with ``out`` and the anchor emr or consensus_ta: write the unified model, and next to it a mask a task,
            from which `reconstruct` makes each task's own model.

    Raises:
        RecipeError, CheckpointError, GramError, MergeError, StudyError, WriteError: see `bmm.errors`.
    """
    if masks and (lam is not None or study is not None or out is None):
        raise RecipeError("masks go with a plain merge that is written", "drop lam and study, and give out")
    if study is not None:
        if recipe is not None or lam is not None:
            raise RecipeError("a study brings its own recipe and hyperparameters", "drop the recipe and lam")
        if out is not None:
            return save(study, trial, out=out, overwrite=overwrite, tasks=tasks, model=model, progress=progress, **keys)
        run, tensors, _ = merged_trial(study, trial, tasks=tasks, model=model, progress=progress, **keys)
        return run.pool.with_ties(tensors)
    chosen = make_recipe(recipe, **keys, **targets(tasks, model)).relative_to(Path.cwd())
    plain = lam is None
    if out is not None:
        destination(out, overwrite)  # says so now where it is taken
    for value in lam.values() if isinstance(lam, Mapping) else [] if lam is None else [lam]:
        check_scalars("merge", value, 1.0, 1.0)
    if masks and out is not None:
        return merge_masked(chosen, Path(out), overwrite, progress)
    if chosen.adapter_rank and out is None:
        raise RecipeError("adapter_rank is for a merge that is written", "give out, or drop adapter_rank")
    if plain and out is not None:
        return _merge_plain(chosen, Path(out), overwrite, tasks, model, progress)
    needs_tasks = bool(anchor_needs(chosen.anchor)) or (not plain and chosen.grams != "datafree")
    run = open_run(chosen, tasks, model, progress, need_tasks=needs_tasks)
    require_memory(chosen, run.pool, "plain" if plain else "merge")
    if plain:
        return run.pool.with_ties(run.anchor(strict=True))
    streamed, anchor = streamed_merge(run)
    at = Hyperparameters(_spread(lam, streamed.groups, "lam"), _spread(rho, streamed.groups, "rho"))
    if out is None:
        return run.pool.with_ties(dict(streamed.at(at, anchor(()))))
    text = ", ".join(f"{name} {value}" for name, value in at.to_json().items())
    card = merge_card(f"anchor `{chosen.anchor}`, {text}", chosen.to_dict(), chosen.to_yaml(), "bmm merge")
    return write_stream(
        run, lambda done: streamed.at(at, anchor(done), done), Path(out), card, overwrite=overwrite, point=at
    )


def _merge_plain(recipe: Recipe, out: Path, overwrite: bool, tasks: Any, model: Any, progress: Progress) -> Path:
    """The anchor method alone, from disk to disk with one module in memory at a time."""
    needs_tasks = bool(anchor_needs(recipe.anchor))
    run = open_run(
        recipe, tasks, model, progress, need_tasks=needs_tasks, check=needs_tasks or recipe.anchor.startswith("path:")
    )
    require_memory(recipe, run.pool, "plain")
    card = merge_card(
        f"plain merge `{recipe.anchor}` {recipe.knobs or ''}".strip(),
        recipe.to_dict(),
        recipe.to_yaml(),
        f"bmm merge --recipe bmm_recipe.yaml --out {out.name}",
    )

    wide = None if recipe.dtype == "same" else torch.float32  # rounded once, to the dtype asked for

    def merged(done: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        if recipe.anchor.startswith("path:"):
            return run.anchor_pairs(done=done)
        return run.anchor_stream(recipe.anchor, recipe.knobs, dtype=wide, strict=True, done=done)

    return write_stream(run, merged, out, card, overwrite=overwrite)


def evaluate(
    checkpoint: str | Path | Mapping[str, Any],
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    split: str = "test",
    tasks: Sequence[Task] | str | None = None,
    model: ModelBuilder | str | None = None,
    progress: Progress = silent,
    **keys: Any,
) -> list[Score]:
    """Score a checkpoint (a path or tensors by name) on every task of the recipe.

    Raises:
        RecipeError: tasks without data for ``split``; CheckpointError: it does not fit the base.
    """
    if split not in ("validation", "test"):
        raise RecipeError(f"no split {split!r}", "validation or test")
    chosen = make_recipe(recipe, **keys, **targets(tasks, model))
    run = open_run(chosen, tasks, model, progress)
    given = checkpoint if isinstance(checkpoint, Mapping) else run.pool.open_model(checkpoint, chosen.skip)
    fitted = ModelPool(run.pool.base, [given], task_names=["checkpoint"])
    fitted.check_finite()
    scores = []
    for done, task in enumerate(run.tasks):
        scores += run.score(fitted.experts[0], split, [task])
        progress("score", done + 1, len(run.tasks), task.name)
    return scores


def collect_grams(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    tasks: Sequence[Task] | str | None = None,
    model: ModelBuilder | str | None = None,
    cached: bool = False,
    progress: Progress = silent,
    **keys: Any,
) -> dict[str, TaskGrams]:
    """Activation Grams by task, of the recipe's ``inputs``, collected or read from the cache.

    A cache that cannot be written is a notice, or with ``cached`` a `WriteError`.
    """
    run = open_run(make_recipe(recipe, **keys, **targets(tasks, model)), tasks, model, progress)
    grams = run.collect_grams() if run.recipe.inputs == "experts" else run.evidence()[1]
    if cached and run.unwritten:
        raise run.unwritten[0]
    return dict(zip(run.experts, grams or [], strict=True))


def align(
    reference: str | Path,
    experts: Mapping[str, str | Path] | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    spec: Spec | str | Path | None = None,
    tasks: Sequence[Task] | str | None = None,
    model: ModelBuilder | str | None = None,
    skip: Sequence[str] = (),
    device: str = "cpu",
    progress: Progress = silent,
    **options: Any,
) -> Alignment:
    """Permute the units of experts that share no base into a reference's basin (Git Re-Basin, arXiv 2209.04836).

    Each aligned expert computes what it did before, and can be averaged with the reference: see docs/rebasin.md.

    Args:
        reference: the checkpoint that stays as it is.
        experts: checkpoints of the same architecture by name; a list names them after their files.
        out: write each aligned expert to ``out/NAME``.
        spec: which axes share a permutation, as a `bmm.rebasin.Spec` or a YAML file. Without: transformer blocks are
            found by name, and any network by a trace where ``tasks`` (and ``model``) are given.
        tasks: validation data for the barrier between reference and expert, before and after.
        options: keys of `bmm.rebasin.Options`: to, seed, heads, within, residual, points, loss.

    Raises:
        RecipeError, CheckpointError, MergeError, WriteError: see `bmm.errors`.
    """
    known = [f.name for f in fields(Options)]
    for key in options:
        if key not in known:
            raise RecipeError(f"align has no option {key!r}", did_you_mean(key, known))
    named = experts if isinstance(experts, Mapping) else {Path(p).stem: p for p in experts}
    if len(named) < len(experts):
        raise RecipeError("two experts have the same file name", "name them: a mapping {name: path}, or NAME=PATH")
    aligner = Aligner(
        reference, named, spec=spec, tasks=tasks, model=model, skip=skip, device=device, options=Options(**options),
        progress=progress,
    )  # fmt: skip
    return aligner.align(out, overwrite)


def load_study(path: str | Path) -> StudyResult:
    """The result of a tuning run from its folder; a running or interrupted study gives its trials so far."""
    return load_result(path)


def analyse(study: StudyResult | str | Path) -> Analysis:
    """What a study's completed trials tell: which hyperparameters mattered and how, and how sure the best is.

    Args:
        study: the folder of a tuning run, finished or not, or its result (whose "study" path must still be right).

    Raises:
        StudyError: no study there, or fewer than 8 completed trials.
    """
    from .analysis import analyse_rows  # scipy, which a merge does not need

    path = study_file(study.paths.get("study", "") if isinstance(study, StudyResult) else study)
    with StudyDatabase.open(path, readonly=True) as database:
        meta, trials = database.meta(), database.trials()
    if "search" not in meta:
        raise StudyError(f"{path} has no trial yet", f"continue it with `bmm tune --resume {path.parent}`")
    trials = study.trials if isinstance(study, StudyResult) else trials
    goal = Goal.from_json(meta["search"])
    return analyse_rows(trials, Space.from_json(meta["search"]["space"]), goal.reference, goal)


def _spread(value: float | Mapping[str, float] | None, groups: list[str], key: str) -> dict[str, float]:
    if isinstance(value, Mapping):
        unknown = set(value) - set(groups)
        if unknown or set(groups) - set(value):
            raise RecipeError(f"{key} by group must name exactly the groups {', '.join(groups)}", f"got {dict(value)}")
        return {g: float(value[g]) for g in groups}
    assert value is not None
    return {g: float(value) for g in groups}


__all__ = [
    "align", "analyse", "average", "calibrate", "collect_grams", "evaluate", "load_study", "make_recipe", "merge",
    "merge_mergekit", "reconstruct", "save", "tune",
]  # fmt: skip
