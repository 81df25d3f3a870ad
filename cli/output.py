"""Progress and results on the terminal: rich bars where there is one, plain lines otherwise."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import Any

import click

STAGES = {
    "check": "checking experts",
    "experts": "scoring experts",
    "grams": "collecting Grams",
    "anchor": "anchor",
    "merge": "merging",
    "prepare": "preparing modules",
    "score": "scoring",
    "sigma": "searching sigma",
    "race": "racing finalists",
    "candidates": "scoring candidates",
    "average": "averaging",
    "batchnorm": "BatchNorm statistics",
}


IN_BYTES = ("merge",)
"""Stages that count bytes."""


def amount(value: float) -> str:
    """Bytes as people read them: 3.2 GB."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


class Console:
    """Shows stages and trials. ``quiet`` shows nothing; without a terminal each finished stage is one line."""

    def __init__(self, quiet: bool = False, budget: int = 0) -> None:
        self.quiet = quiet
        self.budget = budget
        self.live = not quiet and sys.stderr.isatty()
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._begun: dict[str, float] = {}
        self._search_start: float | None = None
        self._made, self._reached = 0, 0

    def __enter__(self) -> Console:
        if self.live:
            from rich.console import Console as Rich
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._bars = Progress(
                TextColumn("{task.description:<18}"),
                BarColumn(bar_width=28),
                TextColumn("{task.fields[done]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
                console=Rich(stderr=True),
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def stage(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """The progress callback of `bmm.run`."""
        if self.quiet:
            return
        if stage == "notice":
            self._say(f"note: {detail}")
            return
        label = STAGES.get(stage, stage)
        if self._bars is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(label, total=total, detail="", done="")
            text = f"{amount(done)}/{amount(total)}" if stage in IN_BYTES else f"{done}/{total}"
            self._bars.update(self._tasks[stage], completed=done, total=total, detail=detail, done=text)
            return
        self._begun.setdefault(stage, time.monotonic())
        if done == total:
            seconds = time.monotonic() - self._begun.pop(stage)
            click.echo(f"{label}: {amount(total) if stage in IN_BYTES else total} done in {seconds:.1f} s", err=True)

    def _say(self, line: str) -> None:
        if self._bars is not None:
            self._bars.console.print(line, highlight=False, markup=False)
        else:
            click.echo(line, err=True)

    def trial(self, trial: Any, best: Any) -> None:
        """One finished trial: number, objective, best so far, seconds left."""
        if self.quiet:
            return
        now = time.monotonic()
        if self._search_start is None:
            self._search_start = now - trial.seconds - trial.suggest_seconds
        self._made, self._reached = self._made + 1, max(self._reached, trial.number + 1)  # they may end in any order
        left = (now - self._search_start) / self._made * (self.budget - self._reached)
        top = f"best {best.objective:.4f} (trial {best.number})" if best else "no completed trial yet"
        if self._bars is not None:
            if "trials" not in self._tasks:
                self._tasks["trials"] = self._bars.add_task("trials", total=self.budget, detail="", done="")
            self._bars.update(
                self._tasks["trials"], completed=self._reached, detail=top, done=f"{self._reached}/{self.budget}"
            )
            return
        shown = f"{trial.objective:.4f}" if trial.objective is not None else f"failed: {trial.error}"
        if trial.status == "stopped":
            shown = f"about {shown}, stopped after {len(trial.scores)} tasks"
        click.echo(f"trial {trial.number + 1}/{self.budget} {trial.kind} {shown}; {top}; {left:.0f} s left", err=True)


def emit(text: str, data: Any, as_json: bool) -> None:
    """The result on standard output: text for people, JSON for programs."""
    click.echo(json.dumps(data, indent=1) if as_json else text.rstrip("\n"))


def written(path: Any) -> tuple[str, dict[str, Any]]:
    """A line and JSON entries on what an adapter written to ``path`` keeps; empty for a full model."""
    from bmm.checkpoint.adapter_writer import read_truncation

    found = read_truncation(path)
    if found is None:
        return "", {}
    kept = f"{100 * found['energy']:.4g} % of the squared change, relative error {found['error']:.3g}"
    return f"\nadapter of rank {found['rank']}: keeps {kept} (each module: truncation.json)", {"adapter": found}
