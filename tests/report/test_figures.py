"""The figures of an analysis hold its numbers, in the parameters' own units, under titles that say what was found."""

import re
from dataclasses import replace

import numpy as np
import pytest

from bmm.analysis import Difference, analyse_rows
from bmm.errors import WriteError
from bmm.report import (
    effects_figure,
    importance_figure,
    parameter_label,
    prediction_figure,
    progress_figure,
    trust,
    write_figures,
)
from bmm.report.figures import AMBER, BLUE, FIGURES, GREEN
from tests.analysis.studies import EXPERTS, GROUPS, rows_at, sobol_points
from tests.search.problem import REFERENCE, SPACE
from tests.search.study_rows import rows_of

MLP = [p.name for p in GROUPS.parameters].index("rho/mlp")


@pytest.fixture(scope="module")
def analysis():
    rows = rows_at(GROUPS, sobol_points(30, len(GROUPS)), lambda unit: 0.9 - 0.3 * (unit[MLP] - 0.9) ** 2)
    return analyse_rows(rows, GROUPS, EXPERTS)


def traces(figure, name):
    return [t for t in figure.data if t.name == name]


def test_labels():
    names = ("log10_lam/mlp", "rho/depth.0", "gamma", "anchor_scale", "log10_weight/cars")
    labels = ["lam of mlp", "rho of depth.0", "gamma", "anchor scale", "weight of cars"]
    assert [parameter_label(n) for n in names] == labels


def test_importance_figure(analysis):
    figure = importance_figure(analysis)
    total, first, ablation = traces(figure, "with interactions")[0], traces(figure, "alone")[0], figure.data[2]
    assert list(total.x) == [i.total for i in analysis.importance]
    assert list(first.x) == [i.first for i in analysis.importance]
    assert list(total.y) == list(first.y) == [parameter_label(i.parameter) for i in analysis.importance]
    assert list(ablation.x) == [a.change.mean for a in analysis.ablations]
    assert list(ablation.error_x.array) == [a.change.sd for a in analysis.ablations]
    assert list(ablation.y) == [a.group for a in analysis.ablations]
    share, loss = analysis.importance[0].total, -analysis.ablations[0].change.mean
    assert figure.layout.title.text == (
        f"rho of mlp matters most: {share:.0%} of the variation; tuning mlp is worth {loss:.3f}"
    )


def test_the_title_claims_no_gain_within_the_error(analysis):
    unsure = [replace(a, change=Difference(-0.001, 0.002)) for a in analysis.ablations]
    assert "worth" not in importance_figure(replace(analysis, ablations=unsure)).layout.title.text


def test_effects_figure_has_a_panel_for_each_parameter(analysis):
    figure = effects_figure(analysis)
    expected, low = traces(figure, "expected"), [t for t in figure.data if t.name is None]
    assert len(expected) == len(low) == len(analysis.effects)
    for trace, edge, effect in zip(expected, low, analysis.effects, strict=True):
        log = effect.parameter.startswith("log10_lam")
        np.testing.assert_allclose(trace.x, 10 ** np.array(effect.grid) if log else effect.grid)
        assert list(trace.y) == effect.mean
        np.testing.assert_allclose(edge.y, np.array(effect.mean) - 1.96 * np.array(effect.sd))
        axis = figure.layout["xaxis" + trace.xaxis.removeprefix("x")]
        assert (axis.type == "log") == log
    best = traces(figure, "best trial")[0]
    assert best.x[0] == analysis.effects[0].best
    assert figure.layout.title.text.startswith("rho of mlp moves the objective by ")
    assert sum(bool(t.showlegend) for t in figure.data) == 4


def test_prediction_figure(analysis):
    figure = prediction_figure(analysis)
    trace = traces(figure, "trials")[0]
    found = analysis.prediction
    assert (list(trace.x), list(trace.y)) == (found.mean, found.observed)
    np.testing.assert_allclose(trace.error_x.array, 1.96 * np.array(found.sd))
    assert [c[0] for c in trace.customdata] == found.trials
    inside = sum(abs(r) <= 1.96 for r in found.residuals)
    assert f"R² {found.r2:.2f}; {inside} of 32 inside" in figure.layout.title.text


def test_progress_figure_of_many_tasks_with_failures():
    rows = rows_of(SPACE, 40)
    analysis = analyse_rows(rows, SPACE, REFERENCE)
    figure, found = progress_figure(analysis), analysis.progress
    assert list(traces(figure, "best so far")[0].y) == found.best
    assert list(traces(figure, "trial")[0].x) == found.trials
    assert set(traces(figure, "anchor")[0].y) == {found.anchor}
    assert set(traces(figure, "default")[0].y) == {found.default}
    for task, shares in found.tasks.items():
        assert list(traces(figure, task)[0].y) == shares
    lines = {(traces(figure, t)[0].line.color, traces(figure, t)[0].line.dash) for t in found.tasks}
    assert len(lines) == len(REFERENCE)
    assert f"{analysis.failed} failed left out" in figure.layout.title.subtitle.text
    gain = found.best[-1] - found.anchor
    assert f"{gain:+.4f} over the anchor" in figure.layout.title.text


def test_colours_mean_the_same_everywhere(analysis):
    progress, effects = progress_figure(analysis), effects_figure(analysis)
    assert traces(progress, "anchor")[0].line.color == AMBER
    assert traces(progress, "default")[0].line.color == traces(effects, "default")[0].marker.color == GREEN
    assert traces(progress, "best so far")[0].line.color == traces(effects, "best trial")[0].marker.color == BLUE


def test_without_a_default_there_is_no_line_for_it(analysis):
    figure = progress_figure(replace(analysis, progress=replace(analysis.progress, default=None)))
    assert not traces(figure, "default")
    assert "default" not in figure.layout.title.text


def test_a_model_that_predicts_nothing_says_so(analysis):
    poor = replace(analysis, prediction=replace(analysis.prediction, r2_refitted=-0.2))
    assert "poorly (R² -0.20)" in trust(poor)
    for figure in FIGURES.values():
        assert "poorly" in figure(poor).layout.title.subtitle.text
    assert "poorly" not in trust(analysis)


def test_equal_objectives_have_figures_too():
    rows = rows_at(GROUPS, sobol_points(10, len(GROUPS)), lambda unit: 0.5)
    titles = [figure(analyse_rows(rows, GROUPS, EXPERTS)).layout.title.text for figure in FIGURES.values()]
    assert titles[0] == "No parameter changes the expected objective"
    assert "all objectives are equal" in titles[2]


def test_files_stand_alone_and_are_replaced(analysis, tmp_path):
    written = write_figures(analysis, tmp_path / "a" / "figures")
    again = write_figures(analysis, tmp_path / "a" / "figures")
    assert [p.name for p in written] == ["importance.html", "effects.html", "prediction.html", "progress.html"]
    assert sorted(p.name for p in written[0].parent.iterdir()) == sorted(p.name for p in again)
    for path in written:
        page = path.read_text()
        assert not re.search(r"<(script|link)[^>]+(src|href)=", page)
        assert re.search(rf'Plotly\.newPlot\(\s*"{path.stem}"', page)
    with pytest.raises(WriteError):
        write_figures(analysis, written[0] / "under-a-file")
