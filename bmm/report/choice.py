"""How the final trial was chosen, where the best observed score did not decide alone."""

from __future__ import annotations

from ..records import Candidate, StudyResult
from .layout import markdown


def choice_lines(result: StudyResult) -> list[str]:
    """In a sentence or two, what decided and what that changed; nothing where the best observed score won as ever."""
    choice = result.choice
    if choice is None:
        return []
    basis = "the mean of a model of all trials" if choice.method == "model" else "the observed score"
    if choice.candidates:
        basis += f", pooled with the score on the {100 * choice.share:g} % of validation inputs held out of the search"
    same = choice.trial == choice.observed
    other = "which also has the best observed score" if same else f"not trial {choice.observed}, the best observed"
    return [f"chosen by {basis}: trial {choice.trial}, {other}"]


def choice_section(result: StudyResult) -> list[str]:
    """The race as a table with what it cost; nothing where there was none."""
    choice = result.choice
    if choice is None or not choice.candidates:
        return []
    rows = [_row(c, choice.tasks) for c in choice.candidates]
    modelled = choice.method == "model"
    header = ["trial", "search", *(["model"] if modelled else []), "held out", "pooled", "race"]
    table = markdown(header, [row if modelled else [*row[:2], *row[3:]] for row in rows])
    cost = f"{choice.used} held-out task scores; {choice.saved} saved by dropping trials early"
    return ["## Final choice (validation objective)", table, cost]


def _row(candidate: Candidate, tasks: int) -> list[str]:
    left = f"dropped after {candidate.tasks} of {tasks} tasks"
    stayed = "to the end" if candidate.tasks == tasks else f"alone after {candidate.tasks} of {tasks} tasks"
    return [
        str(candidate.trial),
        f"{candidate.search:.4f}",
        f"{candidate.expected:.4f}",
        "-" if candidate.holdout is None else f"{candidate.holdout:.4f}",
        f"{candidate.pooled:.4f}",
        left if candidate.dropped else stayed,
    ]
