"""A study's analysis on the terminal, as rich tables."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bmm.analysis import Analysis, Difference

_SHOWN = 12
_PLAIN_WIDTH = 120


def show(analysis: Analysis) -> None:
    """Importance, ablation from the best, quality of the predictions and certainty of the best, on standard output."""
    from rich.console import Console

    # A file or a pipe has no width of its own: rich would cut the tables at 80 columns.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    console.print("\n## Analysis\n", markup=False)
    console.print("[bold]Which hyperparameters mattered[/bold]: share of the variation over the whole search box")
    console.print(_importance(analysis))
    left = len(analysis.importance) - _SHOWN
    if left > 0:
        console.print(f"and {left} more that matter less (--json has them all)\n", markup=False)
    console.print("[bold]The best trial with one group back at its default[/bold]")
    console.print(_ablations(analysis))
    console.print("[bold]Each trial predicted from the others[/bold]")
    console.print(_quality(analysis))
    for line in _certainty(analysis):
        console.print(line, markup=False, soft_wrap=True)


def _table(*columns: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _importance(analysis: Analysis) -> Any:
    from rich.text import Text

    from bmm.report import parameter_label

    table = _table("hyperparameter", "total", "alone", "lengthscale")
    for found in analysis.importance[:_SHOWN]:
        name = Text(parameter_label(found.parameter))
        table.add_row(name, f"{found.total:.1%}", f"{found.first:.1%}", f"{found.lengthscale:.2f}")
    return table


def _ablations(analysis: Analysis) -> Any:
    from rich.text import Text

    from bmm.report import group_label

    table = _table("group", "expected change", "sd")
    for found in analysis.ablations:
        table.add_row(Text(group_label(found.group)), f"{found.change.mean:+.4f}", f"{found.change.sd:.4f}")
    return table


def _quality(analysis: Analysis) -> Any:
    found = analysis.prediction
    table = _table("trials", "R²", "R² refitted", "inside 95 %", "largest residual", "noise sd")
    table.add_row(
        str(len(found.trials)),
        *("-" if r2 is None else f"{r2:.2f}" for r2 in (found.r2, found.r2_refitted)),
        f"{found.coverage:.0%}",
        f"{max(map(abs, found.residuals)):.1f} sd",
        f"{analysis.noise_sd:.4f}",
    )
    return table


def _certainty(analysis: Analysis) -> list[str]:
    from bmm.report import trust

    found = analysis.certainty
    best, expected = found.best, found.expected_best
    lines = [
        f"{trust(analysis)}.",
        f"best observed: trial {best.trial}, {best.observed:.4f}; expected {best.mean:.4f} ± {best.sd:.4f}",
    ]
    if expected.trial == best.trial:
        lines.append("it is also the trial with the highest expectation")
    else:
        lines.append(
            f"highest expectation: trial {expected.trial}, {expected.mean:.4f} ± {expected.sd:.4f}; ahead of the best "
            f"observed by {_with_error(found.lead)}"
        )
    for name, gain in (("anchor", found.over_anchor), ("default", found.over_default)):
        if gain is not None:
            lines.append(f"expected gain of the best observed over the {name}: {_with_error(gain)}")
    return lines


def _with_error(found: Difference) -> str:
    return f"{found.mean:+.4f} ± {found.sd:.4f}"
