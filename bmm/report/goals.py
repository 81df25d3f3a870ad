"""What a study's goal asked for and whether it was met; the Pareto front as a table and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.atomic import writing
from ..errors import RecipeError, StudyError
from ..records import StudyResult, Trial
from ..search.goal import Goal
from .layout import markdown

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_KINDS = {"worst": "the worst task's score / its expert's", "geometric": "the geometric mean of score / expert's"}
_GREY, _BLUE, _RED = "#9aa5b1", "#1f6feb", "#c9372c"


def goal_lines(result: StudyResult) -> list[str]:
    """What was maximised, where it is not the mean, and whether the floors hold; nothing for a plain mean."""
    if not result.goal:
        return []
    goal, lines = Goal.from_json(result.goal), []
    if goal.kind != "mean":
        lines.append(f"goal: {_KINDS[goal.kind]}" + (", in each objective" if goal.objectives else ""))
    if goal.objectives:
        lines.append("the validation objective is the mean of " + ", ".join(goal.objectives))
    if goal.floors:
        lines.append(_floors(goal, result))
    return lines


def _floors(goal: Goal, result: StudyResult) -> str:
    number, scores = result.best.number, result.best.scores
    kept = sum(not missed for missed in result.violations.values())
    if short := goal.shortfalls(scores):
        tasks = ", ".join(
            f"{t} has {scores[t] / goal.reference[t]:.3f} of its expert, floor {goal.floors[t]:g}" for t in short
        )
        return f"no trial keeps every floor; trial {number} misses them least: {tasks}"
    return f"floors: kept by trial {number}, and by {kept} of {len(result.violations)} completed trials"


def pareto_table(result: StudyResult) -> str:
    """The front: one row a trial, its objectives in shares of the experts' scores, and the study's own objective.

    Raises `StudyError` for a study of one objective.
    """
    front = result.pareto()
    names = list(front[0][1])
    rows = [
        [str(t.number), t.kind, *[f"{values[n]:.4f}" for n in names], f"{t.objective:.4f}"]
        + ([f"{missed:.4f}" if (missed := result.violations[t.number]) else "-"] if result.violations else [])
        for t, values in front
    ]
    return markdown(["trial", "kind", *names, "mean", *(["below floors"] if result.violations else [])], rows)


def pareto_figure(result: StudyResult) -> Figure:
    """All completed trials by their objectives, the front marked: a scatter plot, or a matrix of them beyond two.

    Raises `StudyError` for a study of one objective, or where plotly is not installed.
    """
    front = {t.number for t, _ in result.pareto()}
    try:
        from plotly import graph_objects
    except ImportError as error:
        raise StudyError(f"figures need plotly: {error}", "pip install plotly") from error
    trials = [t for t in result.trials if t.number in result.objectives]
    others = [t for t in trials if t.number not in front]
    chosen = [t for t, _ in result.pareto()]
    names = list(result.objectives[trials[0].number])
    traces = [
        _trace(graph_objects, result, others, names, "other trials", _GREY),
        _trace(graph_objects, result, chosen, names, "Pareto front", _BLUE),
    ]
    figure = graph_objects.Figure(traces)
    figure.update_layout(
        title="Validation score as a share of the expert's", template="plotly_white", hovermode="closest"
    )
    if len(names) == 2:
        figure.update_layout(xaxis_title=names[0], yaxis_title=names[1])
    return figure


def _trace(plotly: Any, result: StudyResult, trials: list[Trial], names: list[str], label: str, colour: str) -> Any:
    values = [[result.objectives[t.number][n] for t in trials] for n in names]
    missed = [result.violations.get(t.number, 0.0) for t in trials]
    marker = {
        "color": [_RED if m else colour for m in missed],
        "symbol": ["x" if m else "circle" for m in missed],
        "size": 9,
    }
    text = [
        f"trial {t.number} ({t.kind})" + (f"<br>below floors by {m:.4f}" if m else "")
        for t, m in zip(trials, missed, strict=True)
    ]
    if len(names) > 2:
        dimensions = [{"label": n, "values": v} for n, v in zip(names, values, strict=True)]
        return plotly.Splom(dimensions=dimensions, name=label, text=text, marker=marker, diagonal_visible=False)
    mode = "lines+markers" if colour == _BLUE else "markers"
    line = {"shape": "hv", "width": 1, "color": colour}  # what the front dominates ends at these steps
    return plotly.Scatter(x=values[0], y=values[1], mode=mode, line=line, name=label, text=text, marker=marker)


def write_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as one HTML file that needs no network.

    Raises `RecipeError` for a name that does not end in .html, `WriteError` where it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".html":
        raise RecipeError(f"cannot write a figure to {path}", "give a file that ends in .html")
    with writing(path):
        path.write_text(figure.to_html(include_plotlyjs=True, full_html=True, div_id="pareto"), encoding="utf-8")
    return path
