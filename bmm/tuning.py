"""Tuning from end to end: prepare once, search, score the winner, write checkpoint, card and report."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from .checkpoint.atomic import require_place, writing
from .choosing import choose_trial
from .errors import StudyError, WriteError
from .evaluation import Task
from .groups import coarser_groups
from .loading import ModelBuilder
from .memory import require_memory
from .merging import PreparedModel
from .notation import StateDict
from .opening import require_same_inputs
from .progress import Progress, silent, stopwatch
from .recipe import Recipe
from .records import Choice, Hyperparameters, Score, StudyResult, Trial
from .report import study_card, text_report, versions
from .run import Run
from .search.database import StudyDatabase
from .search.engine import engine_row
from .search.goal import Goal
from .search.space import Space
from .search.study import best, run_study
from .workers import check_workers, evaluation
from .writing import write_model

STUDY, RESULT, REPORT, MODEL = "study.db", "result.json", "report.md", "model"
RESUMABLE = ("budget", "device", "cache", "workers", "executor")
"""Keys of the recipe that may be given anew when a study is resumed: no row depends on them but for rounding."""
OnTrial = Callable[[Trial, Trial | None], None]


def default_out(recipe: Recipe) -> str:
    """runs/NAME, named after the zoo or the base and the anchor."""
    source = recipe.zoo or ("vit8" if not recipe.base else Path(recipe.base).stem)
    anchor = Path(recipe.anchor.removeprefix("path:")).name if recipe.anchor.startswith("path:") else recipe.anchor
    return str(Path("runs") / f"{source}-{anchor}-{recipe.grams}-seed{recipe.seed}")


def study_file(folder: str | Path) -> Path:
    """The study database of a run's folder. Raises `StudyError` where there is none."""
    path = Path(folder)
    path = path / STUDY if path.is_dir() else path
    if not path.is_file():
        raise StudyError(f"no study in {folder}", "give the folder that `bmm tune` wrote to (its --out)")
    return path


def tune_recipe(
    recipe: Recipe,
    *,
    tasks: Sequence[Task] | None = None,
    model: ModelBuilder | None = None,
    resume: bool = False,
    progress: Progress = silent,
    on_trial: OnTrial | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> StudyResult:
    """Run or continue the study of ``recipe`` in ``recipe.out`` and write its results.

    Raises:
        StudyError: the folder already holds a study (or, when resuming, none, or another one).
        RecipeError, CheckpointError, GramError, MergeError: what is wrong with the input.
        KeyboardInterrupt: passes through; the study can be resumed.
    """
    # Absolute paths: the recipe travels with the study and the model, and is used from other folders.
    recipe = replace(recipe.relative_to(Path.cwd()), out=recipe.out or default_out(recipe))
    recipe.require_evidence()
    engine_row(recipe.engine).require(recipe.engine)
    check_workers(recipe, tasks, model)
    out = Path(recipe.out)
    if not resume and StudyDatabase.begun(out / STUDY):
        raise StudyError(
            f"{out} already holds a study", f"continue it with `bmm tune --resume {out}`, or choose another --out"
        )
    require_place(out)
    seconds: dict[str, float] = {}
    with stopwatch(seconds, "open"):
        run = Run(recipe, tasks=tasks, model=model, progress=progress)
    recipe = run.recipe
    require_memory(recipe, run.pool, "tune")
    with stopwatch(seconds, "experts"):
        experts = run.score_experts("validation")
    with stopwatch(seconds, "prepare"):
        prepared = run.prepare()
    inputs = run.pool.fingerprint()
    space = search_space(run, prepared.groups)
    grouped = {slot.weight: slot.group for slot in prepared.slots}
    coarse = coarser_groups(grouped, recipe.groups, recipe.group) if recipe.refine else []
    database = (
        StudyDatabase.open(out / STUDY)
        if resume
        else StudyDatabase.create(out / STUDY, {"recipe": recipe.to_dict(), "versions": versions(), "inputs": inputs})
    )
    with database:
        if resume:
            require_same_inputs(database, inputs, "put the original ones back, or start a new study")
            database.set_meta("recipe", recipe.to_dict())
        reference = database.meta().get("search", {}).get("reference")
        if reference is None:  # a resumed study keeps the very numbers it began with
            reference = {s.task: s.value for s in experts}
        with stopwatch(seconds, "search"), evaluation(run, prepared, tasks, model) as evaluate:
            trials = run_study(
                database,
                space,
                evaluate,
                reference=reference,
                budget=recipe.budget,
                seed=recipe.seed,
                engine=recipe.engine,
                early_stopping=recipe.early_stopping,
                weights=dict(zip(run.experts, run.weights, strict=True)) if recipe.weights else None,
                score_by=recipe.score_by,
                goal=recipe.goal,
                floor=recipe.floor,
                objectives=recipe.objectives,
                refine=coarse,
                on_trial=on_trial,
                should_stop=should_stop,
            )
        goal = Goal.from_json(database.meta()["search"])
        with stopwatch(seconds, "choice") if run.held else contextlib.nullcontext():
            chosen = choose_trial(run, prepared, trials, space, goal, database)
        try:
            return finish(run, prepared, trials, experts, seconds, goal, *chosen)
        except WriteError as error:
            hint = f"{error.hint}; no trial is lost: then `bmm tune --resume {out}`"
            raise WriteError(error.message, hint) from error


def search_space(run: Run, groups: list[str]) -> Space:
    """lam and rho of every group, and what the recipe's ``search`` adds, at the recipe's values."""
    recipe = run.recipe
    return Space.for_groups(groups, recipe.log10_lam, recipe.rho).extended(
        gamma=recipe.gamma if "gamma" in recipe.search else None,
        weights=dict(zip(run.experts, run.weights, strict=True)) if "weights" in recipe.search else None,
        anchor_scale=1.0 if "anchor_scale" in recipe.search else None,
    )


def finish(
    run: Run,
    prepared: PreparedModel,
    trials: list[Trial],
    experts: list[Score],
    seconds: dict[str, float],
    goal: Goal,
    winner: Trial,
    choice: Choice | None = None,
) -> StudyResult:
    """Score anchor, default and best (test data once), write the checkpoint, the card, the report and result.json."""
    recipe, out = run.recipe, Path(run.recipe.out)
    default = trials[1].hyperparameters if len(trials) > 1 else Hyperparameters.uniform(prepared.groups, 1.0)
    models: dict[str, StateDict] = {
        "base": {n: run.pool.base[n] for n in run.pool.names},
        "anchor": prepared.merge(trials[0].hyperparameters),
        "default": prepared.merge(default),
        "best": prepared.merge(winner.hyperparameters),
    }
    scores: dict[str, dict[str, list[Score]]] = {"validation": {}, "test": {}}
    splits = ["validation", "test"] if run.has_test else ["validation"]
    with stopwatch(seconds, "final scores"):
        for done, (split, name) in enumerate((s, m) for s in splits for m in models):
            scores[split][name] = run.score(models[name], split)
            run.progress("score", done + 1, len(splits) * len(models), f"{name} on {split}")
        for split in splits:
            scores[split]["experts"] = experts if split == "validation" else run.score_experts(split)
    paths = {
        "checkpoint": str(out / MODEL),
        "card": str(out / MODEL / "README.md"),
        "report": str(out / REPORT),
        "result": str(out / RESULT),
        "study": str(out / STUDY),
    }
    about = {"choice": choice, **goal.judged(trials)}
    result = StudyResult(
        winner, trials, scores["validation"], scores["test"], paths, recipe.to_dict(), seconds, **about
    )
    with stopwatch(seconds, "write"):
        write_model(run, models["best"], out / MODEL, study_card(result, recipe.to_yaml()), overwrite=True)
    write_text(out / REPORT, text_report(result))
    write_text(out / RESULT, json.dumps(result.to_json(), indent=1) + "\n")
    return result


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all. Raises `WriteError`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            temporary.write_text(text)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def load_result(folder: str | Path) -> StudyResult:
    """The result of a run's folder; an unfinished study gives its trials so far, without test scores.

    Raises:
        StudyError: no study there, or one without a completed trial.
    """
    path = study_file(folder)
    finished = path.parent / RESULT
    with StudyDatabase.open(path, readonly=True) as database:
        meta, trials = database.meta(), database.trials()
    if finished.is_file():
        try:
            result = StudyResult.from_json(json.loads(finished.read_text()))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise StudyError(f"{finished} is damaged", f"`bmm tune --resume {path.parent}` writes it again") from error
        if len(result.trials) == len(trials):
            return replace(result, paths=result.paths | {"study": str(path)})
    if not any(t.status == "completed" for t in trials):
        raise StudyError(f"{path} has no completed trial yet", f"continue it with `bmm tune --resume {path.parent}`")
    goal = Goal.from_json(meta["search"])
    winner = best(trials, goal)
    rows = {"anchor": trials[0], "default": trials[1] if len(trials) > 1 else trials[0], "best": winner}
    # n is not recorded with trials: the raw validation scores stand without a standard error.
    validation = {m: [Score(k, v, 0) for k, v in t.scores.items()] for m, t in rows.items() if t.scores}
    validation["experts"] = [Score(k, v, 0) for k, v in goal.reference.items()]
    judged = goal.judged(trials)
    return StudyResult(winner, trials, validation, {}, {"study": str(path)}, meta["recipe"], **judged)
