"""Results for people to read."""

from .calibration import calibration_report
from .card import average_card, merge_card, study_card, versions
from .figures import (
    effects_figure,
    group_label,
    importance_figure,
    parameter_label,
    prediction_figure,
    progress_figure,
    trust,
    write_figures,
)
from .goals import goal_lines, pareto_figure, pareto_table, write_figure
from .layout import markdown
from .methods import knob_range, method_page, methods_index, write_pages
from .tables import (
    gap_error,
    gap_line,
    mean_and_error,
    percent,
    score_table,
    text_report,
    trial_rows,
    trial_table,
)

__all__ = [
    "average_card", "calibration_report", "effects_figure", "gap_error", "gap_line", "goal_lines", "group_label",
    "importance_figure", "knob_range", "markdown", "mean_and_error", "merge_card", "method_page", "methods_index",
    "parameter_label", "pareto_figure", "pareto_table", "percent", "prediction_figure", "progress_figure",
    "score_table", "study_card", "text_report", "trial_rows", "trial_table", "trust", "versions", "write_figure",
    "write_figures", "write_pages",
]  # fmt: skip
