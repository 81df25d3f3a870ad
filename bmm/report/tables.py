"""Results as Markdown tables and JSON-ready rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..records import Hyperparameters, Score, StudyResult, Trial
from .choice import choice_lines, choice_section
from .goals import goal_lines, pareto_table
from .layout import markdown

MODELS = ("base", "anchor", "default", "best", "experts")


def mean_and_error(scores: Sequence[Score]) -> tuple[float, float]:
    """Mean over tasks and its standard error, the tasks' sampling errors taken as independent."""
    mean = sum(s.value for s in scores) / len(scores)
    return mean, math.sqrt(sum(s.standard_error**2 for s in scores)) / len(scores)


def percent(value: float, error: float | None = None) -> str:
    """'61.5' or '61.5 ± 1.2'."""
    if math.isnan(value):
        return "-"
    text = f"{100 * value:.1f}"
    return text if error is None or math.isnan(error) else f"{text} ± {100 * error:.1f}"


def measure(recipe: Mapping[str, Any], split: str) -> str:
    """What a run's scores are: without labels, validation scores are agreement with the experts."""
    agreement = split == "validation" and recipe.get("score_by") == "agreement"
    return "agreement with the experts" if agreement else "accuracy"


def score_table(models: Mapping[str, Sequence[Score]]) -> str:
    """One row a task and one column a model, in percent; the mean carries its standard error."""
    shown = [m for m in MODELS if models.get(m)] + [m for m in models if m not in MODELS]
    tasks = [s.task for s in models[shown[0]]]
    rows = []
    for number, task in enumerate(tasks):
        n = models[shown[0]][number].n
        rows.append([task, str(n), *[percent(models[m][number].value) for m in shown]])
    means = [percent(*mean_and_error(models[m])) for m in shown]
    return markdown(["task", "n", *shown], [*rows, ["mean", "", *means]])


def hyperparameter_table(best: Hyperparameters) -> str:
    """lam and rho by module group, and below what else was searched."""
    rows = [[g, f"{best.lam[g]:.4g}", f"{best.rho[g]:.3f}"] for g in best.lam]
    lines = []
    if best.gamma is not None:
        lines.append(f"gamma {best.gamma:.3f}")
    if best.anchor_scale is not None:
        lines.append(f"anchor scale {best.anchor_scale:.3f}")
    if best.weights:
        lines.append("task weights " + ", ".join(f"{task} {weight:.3g}" for task, weight in best.weights.items()))
    return "\n\n".join([markdown(["group", "lam", "rho"], rows), *(["; ".join(lines)] if lines else [])])


def trial_rows(trials: Sequence[Trial], violations: Mapping[int, float] | None = None) -> list[dict[str, Any]]:
    """Trials as flat rows with the best objective so far: of trials that keep the floors, as soon as there is one."""
    best, least, rows = -math.inf, math.inf, []
    for t in trials:
        if t.objective is not None and t.status == "completed":
            missed = (violations or {}).get(t.number, 0.0)
            if (-missed, t.objective) > (-least, best):
                best, least = t.objective, missed
        rows.append(
            {
                "trial": t.number,
                "kind": t.kind,
                "status": t.status,
                "objective": t.objective,
                "best": best if math.isfinite(best) else None,
                "seconds": round(t.seconds, 3),
                "suggest_seconds": round(t.suggest_seconds, 3),
                "error": t.error,
            }
        )
    return rows


def trial_table(trials: Sequence[Trial], violations: Mapping[int, float] | None = None) -> str:
    """All trials: kind, status, objective, best so far (see `trial_rows`), seconds."""
    rows = [
        [
            str(r["trial"]),
            r["kind"],
            r["status"],
            "-" if r["objective"] is None else f"{r['objective']:.4f}",
            "-" if r["best"] is None else f"{r['best']:.4f}",
            f"{r['suggest_seconds']:.2f}",
            f"{r['seconds']:.2f}",
        ]
        for r in trial_rows(trials, violations)
    ]
    return markdown(["trial", "kind", "status", "objective", "best", "suggest s", "evaluate s"], rows)


def gap_error(result: StudyResult, split: Literal["validation", "test"]) -> float:
    """Standard error of the share of the gap closed; NaN where the experts do not beat the anchor.

    Best and anchor are scored on the same inputs: treating them as independent overstates the error.
    """
    scores = getattr(result, split)
    gap = result.mean("experts", split) - result.mean("anchor", split)
    errors = [mean_and_error(scores[m])[1] for m in ("best", "anchor")]
    return math.hypot(*errors) / gap if gap > 0 else math.nan


def gap_line(result: StudyResult, split: Literal["validation", "test"]) -> str:
    """The share of the gap between anchor and experts that the tuned merge closes, with its standard error."""
    share = result.gap_closed(split)
    if math.isnan(share):
        return f"gap closed on {split}: not defined (the experts do not beat the anchor)"
    error = gap_error(result, split)
    return f"gap closed on {split}: {100 * share:.1f} % ± {100 * error:.1f} of anchor to experts"


def text_report(result: StudyResult) -> str:
    """Everything a user wants to read after a run, as plain Markdown."""
    split: Literal["validation", "test"] = "test" if result.test else "validation"
    done = [t for t in result.trials if t.status == "completed"]
    failed = [t for t in result.trials if t.status == "failed"]
    stopped = [t for t in result.trials if t.status == "stopped"]
    tasks = len(result.best.scores)
    saved = sum(tasks - len(t.scores) for t in stopped)
    parts = [
        f"## {split.capitalize()} {measure(result.recipe, split)} (%)",
        score_table(getattr(result, split)),
        gap_line(result, split),
        "## Best trial",
        f"trial {result.best.number} ({result.best.kind}) of {len(done)} completed"
        + (f", {len(failed)} failed" if failed else "")
        + (
            f", {len(stopped)} stopped early ({saved} of {tasks * len(result.trials)} task scores saved)"
            if stopped
            else ""
        )
        + f"; validation objective {result.best.objective:.4f}",
        *goal_lines(result),
        *choice_lines(result),
        hyperparameter_table(result.hyperparameters),
    ]
    parts += choice_section(result)
    if result.objectives:
        save = "Save any of them with `bmm save RUN --trial N --out FOLDER`."
        parts += ["## Pareto front (validation, shares of the experts' scores)", pareto_table(result), save]
    if result.test:
        parts += [f"## Validation {measure(result.recipe, 'validation')} (%)", score_table(result.validation)]
    if result.seconds:
        parts += ["## Seconds", ", ".join(f"{k} {v:.1f}" for k, v in result.seconds.items())]
    if result.paths:
        parts += ["## Files", "\n".join(f"{k}: {v}" for k, v in result.paths.items())]
    return "\n\n".join(parts) + "\n"
