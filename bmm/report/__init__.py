"""Results for people to read."""

from .card import merge_card, study_card, versions
from .tables import (
    gap_error,
    gap_line,
    markdown,
    mean_and_error,
    percent,
    score_table,
    text_report,
    trial_rows,
    trial_table,
)

__all__ = [
    "gap_error", "gap_line", "markdown", "mean_and_error", "merge_card", "percent", "score_table", "study_card",
    "text_report", "trial_rows", "trial_table", "versions",
]  # fmt: skip
