"""Interactive figures of a study's analysis (plotly): what mattered, how, how well it is known, how it went.

Titles say what was found. Colours mean the same in all four: blue the tuned merge and what the model says of it, amber
the anchor, green the default, grey what was observed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.atomic import writing

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from ..analysis import Analysis, Effect

BLUE, PALE, BAND = "#3c78d8", "#a9c4ef", "rgba(60, 120, 216, 0.18)"
AMBER, GREEN, GREY, DARK = "#e6a23c", "#2a9d8f", "#8c8c8c", "#444444"
TASK_COLOURS = ("#3c78d8", "#e6a23c", "#2a9d8f", "#c0392b", "#8e63b8", "#7f6a55", "#d977a8", "#9aa63b")
_DASHES = ("solid", "dash", "dot", "dashdot")
_POOR = 0.3
_WIDE = 1.96
_COLUMNS = 4
_LOG10 = "log10_"
_WHOLE = {"gamma": "gamma", "anchor_scale": "anchor scale", "log10_weight": "task weights"}


def parameter_label(name: str) -> str:
    """'lam of mlp' for 'log10_lam/mlp': the parameter itself, whatever the search's scale."""
    kind, _, owner = name.partition("/")
    kind = _WHOLE.get(kind, kind) if not owner else kind.removeprefix(_LOG10)
    return f"{kind} of {owner}" if owner else kind


def group_label(name: str) -> str:
    """The name of a module group, or of what else went back to its default."""
    return _WHOLE.get(name, name)


def importance_figure(analysis: Analysis) -> Figure:
    """Sobol indices by parameter, and what the best trial is expected to lose when a group goes back to its default."""
    from plotly.graph_objects import Bar
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=1, cols=2, column_widths=[0.55, 0.45], horizontal_spacing=0.16,
        subplot_titles=("Share of the objective's variation over the search box", "Best trial, a group at its default"),
    )  # fmt: skip
    names = [parameter_label(i.parameter) for i in analysis.importance]
    figure.add_trace(
        Bar(
            y=names, x=[i.total for i in analysis.importance], orientation="h", name="with interactions",
            marker_color=PALE, customdata=[i.lengthscale for i in analysis.importance],
            hovertemplate="%{y}: total %{x:.3f}, lengthscale %{customdata:.2f} of the range<extra></extra>",
        ), 1, 1,
    )  # fmt: skip
    figure.add_trace(
        Bar(
            y=names, x=[i.first for i in analysis.importance], orientation="h", name="alone", marker_color=BLUE,
            width=0.4, hovertemplate="%{y}: first order %{x:.3f}<extra></extra>",
        ), 1, 1,
    )  # fmt: skip
    changes = [a.change for a in analysis.ablations]
    figure.add_trace(
        Bar(
            y=[group_label(a.group) for a in analysis.ablations], x=[c.mean for c in changes], orientation="h",
            marker_color=GREEN, showlegend=False,
            error_x={"type": "data", "array": [c.sd for c in changes], "color": DARK, "thickness": 1},
            hovertemplate="%{y}: %{x:+.4f}<extra></extra>",
        ), 1, 2,
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", automargin=True, ticksuffix="  ")
    figure.update_xaxes(title_text="Sobol index", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title_text="expected change of the objective ± sd", row=1, col=2)
    figure.update_layout(barmode="overlay", legend={"x": 0.46, "xanchor": "right", "y": 0, "yanchor": "bottom"})
    return _dressed(figure, _importance_title(analysis), analysis, height=max(420, 150 + 22 * len(names)))


def effects_figure(analysis: Analysis) -> Figure:
    """Expected objective along each parameter with its 95 % band, the most important first, on one common scale."""
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    effects = analysis.effects
    rows = math.ceil(len(effects) / _COLUMNS)
    figure = make_subplots(
        rows=rows, cols=_COLUMNS, shared_yaxes="all", horizontal_spacing=0.03, vertical_spacing=0.35 / rows,
        subplot_titles=[parameter_label(e.parameter) for e in effects],
    )  # fmt: skip
    for place, effect in enumerate(effects):
        row, column = place // _COLUMNS + 1, place % _COLUMNS + 1
        unit = _unit(effect)
        x = [unit(v) for v in effect.grid]
        edges = [[m + side * _WIDE * s for m, s in zip(effect.mean, effect.sd, strict=True)] for side in (-1, 1)]
        legend = place == 0
        hidden: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        figure.add_trace(Scatter(x=x, y=edges[0], showlegend=False, **hidden), row, column)
        figure.add_trace(
            Scatter(x=x, y=edges[1], fill="tonexty", fillcolor=BAND, name="95 % band", showlegend=legend, **hidden),
            row, column,
        )  # fmt: skip
        figure.add_trace(
            Scatter(x=x, y=effect.mean, mode="lines", line={"color": BLUE}, name="expected", showlegend=legend),
            row, column,
        )  # fmt: skip
        for name, value, colour, symbol in (
            ("default", effect.default, GREEN, "line-ns-open"),
            ("best trial", effect.best, BLUE, "circle"),
        ):
            mark = {"color": colour, "symbol": symbol, "size": 10, "line": {"width": 2}}
            figure.add_trace(
                Scatter(
                    x=[unit(value)], y=[_at(effect, value)], mode="markers", marker=mark, name=name, showlegend=legend
                ),
                row, column,
            )  # fmt: skip
        if effect.parameter.startswith(_LOG10):
            figure.update_xaxes(type="log", exponentformat="power", tickfont_size=10, row=row, col=column)
        if column == 1:
            figure.update_yaxes(title_text="objective", row=row, col=column)
    return _dressed(figure, _effects_title(analysis), analysis, height=130 + 210 * rows)


def prediction_figure(analysis: Analysis) -> Figure:
    """Every trial's objective as observed, against what the model expects of it from all other trials."""
    from plotly.graph_objects import Scatter

    found = analysis.prediction
    low = min(*found.observed, *(m - _WIDE * s for m, s in zip(found.mean, found.sd, strict=True)))
    high = max(*found.observed, *(m + _WIDE * s for m, s in zip(found.mean, found.sd, strict=True)))
    figure = _figure()
    figure.add_trace(
        Scatter(
            x=[low, high], y=[low, high], mode="lines", line={"color": GREY, "dash": "dash"}, name="perfect",
            hoverinfo="skip",
        )
    )  # fmt: skip
    figure.add_trace(
        Scatter(
            x=found.mean, y=found.observed, mode="markers", marker={"color": BLUE, "size": 7}, name="trials",
            error_x={"type": "data", "array": [_WIDE * s for s in found.sd], "color": PALE, "thickness": 1, "width": 0},
            customdata=list(zip(found.trials, found.residuals, strict=True)),
            hovertemplate="trial %{customdata[0]}: expected %{x:.4f}, observed %{y:.4f}, "
            "residual %{customdata[1]:+.1f} sd<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title_text="expected from the other trials, with 95 % interval")
    figure.update_yaxes(title_text="observed objective")
    inside = round(found.coverage * len(found.trials))
    r2 = "all objectives are equal" if found.r2 is None else f"R² {found.r2:.2f}"
    title = f"Each trial predicted from the others: {r2}; {inside} of {len(found.trials)} inside their 95 % interval"
    return _dressed(figure, title, analysis, height=560)


def progress_figure(analysis: Analysis) -> Figure:
    """Objectives and best so far, with anchor and default as lines; below, the tasks' scores of the best so far."""
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    found = analysis.progress
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.09, row_heights=[0.5, 0.5],
        subplot_titles=("Objective", "Tasks at the best so far, as a share of their experts"),
    )  # fmt: skip
    figure.add_trace(
        Scatter(
            x=found.trials, y=found.objectives, mode="markers", marker={"color": GREY, "size": 6}, name="trial",
            hovertemplate="trial %{x}: %{y:.4f}<extra></extra>",
        ), 1, 1,
    )  # fmt: skip
    step = {"color": BLUE, "shape": "hv", "width": 2}
    figure.add_trace(Scatter(x=found.trials, y=found.best, mode="lines", line=step, name="best so far"), 1, 1)
    ends = [found.trials[0], found.trials[-1]]
    for name, level, colour in (("anchor", found.anchor, AMBER), ("default", found.default, GREEN)):
        if level is not None:
            line = {"color": colour, "dash": "dash"}
            figure.add_trace(Scatter(x=ends, y=[level, level], mode="lines", line=line, name=name), 1, 1)
    for number, (task, shares) in enumerate(found.tasks.items()):
        line = _task_line(number)
        figure.add_trace(Scatter(x=found.trials, y=shares, mode="lines", line=line, name=task, legend="legend2"), 2, 1)
    figure.update_xaxes(title_text="trial", row=2, col=1)
    figure.update_layout(legend={"y": 1, "yanchor": "top"}, legend2={"y": 0.45, "yanchor": "top"})
    return _dressed(figure, _progress_title(analysis), analysis, height=720)


FIGURES: dict[str, Callable[[Analysis], Figure]] = {
    "importance": importance_figure,
    "effects": effects_figure,
    "prediction": prediction_figure,
    "progress": progress_figure,
}


def write_figures(analysis: Analysis, folder: str | Path) -> list[Path]:
    """One HTML file a figure, each whole in itself and readable offline; files of the same names are replaced.

    Raises `WriteError` where the folder cannot be written.
    """
    folder, written = Path(folder), []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in FIGURES.items():
            page = figure(analysis).to_html(include_plotlyjs=True, full_html=True, div_id=name)
            temporary = folder / f".{name}.{os.getpid()}.tmp"
            temporary.write_text(page, encoding="utf-8")
            written.append(temporary.replace(folder / f"{name}.html"))
    return written


def trust(analysis: Analysis) -> str:
    """How far the model can be believed, in a few words."""
    r2 = analysis.prediction.r2_refitted
    if r2 is None:
        return "all objectives are equal: there is nothing to explain"
    if r2 < _POOR:
        return f"trials the model was not fitted to are predicted poorly (R² {r2:.2f}): take this as a hint at most"
    return f"trials the model was not fitted to are predicted with R² {r2:.2f}"


def _importance_title(analysis: Analysis) -> str:
    first = analysis.importance[0]
    if first.total == 0:
        return "No parameter changes the expected objective"
    title = f"{parameter_label(first.parameter)} matters most: {first.total:.0%} of the variation"
    worst = analysis.ablations[0]
    if worst.change.mean + worst.change.sd < 0:
        title += f"; tuning {group_label(worst.group)} is worth {-worst.change.mean:.3f}"
    return title


def _effects_title(analysis: Analysis) -> str:
    heights = {e.parameter: max(e.mean) - min(e.mean) for e in analysis.effects}
    steepest = max(analysis.effects, key=lambda e: heights[e.parameter])
    height = heights[steepest.parameter]
    if height < 5e-4:
        return "No parameter by itself changes the expected objective"
    top = _unit(steepest)(steepest.grid[steepest.mean.index(max(steepest.mean))])
    return f"{parameter_label(steepest.parameter)} moves the objective by {height:.3f} on average, highest at {top:.3g}"


def _progress_title(analysis: Analysis) -> str:
    best, found = analysis.certainty.best, analysis.progress
    title = f"Best {best.observed:.4f} at trial {best.trial}"
    gains = [
        f"{best.observed - level:+.4f} over the {name}"
        for name, level in (("anchor", found.anchor), ("default", found.default))
        if level is not None
    ]
    return f"{title}: {', '.join(gains)}" if gains else title


def _unit(effect: Effect) -> Callable[[float], float]:
    """From the search space's units to the parameter's own."""
    return (lambda v: 10.0**v) if effect.parameter.startswith(_LOG10) else float


def _at(effect: Effect, value: float) -> float:
    """The expected objective at a value between the points of the grid."""
    import numpy as np

    return float(np.interp(value, effect.grid, effect.mean))


def _task_line(number: int) -> dict[str, Any]:
    """A line of its own for each of the first 32 tasks: colours first, then dashes."""
    turn, colour = divmod(number, len(TASK_COLOURS))
    return {"color": TASK_COLOURS[colour], "dash": _DASHES[turn % len(_DASHES)], "shape": "hv", "width": 1.5}


def _figure() -> Figure:
    from plotly.graph_objects import Figure

    return Figure()


def _dressed(figure: Figure, title: str, analysis: Analysis, height: int) -> Figure:
    left_out = [f"{n} {what}" for n, what in ((analysis.failed, "failed"), (analysis.pending, "pending")) if n]
    counted = f"{analysis.completed} completed trials" + (f" ({', '.join(left_out)} left out)" if left_out else "")
    figure.update_layout(
        title={"text": title, "subtitle": {"text": f"{counted}; {trust(analysis)}"}, "x": 0.02, "xanchor": "left"},
        template="plotly_white", font={"color": DARK, "size": 12}, height=height, margin={"t": 100, "l": 80, "r": 40},
    )  # fmt: skip
    return figure
