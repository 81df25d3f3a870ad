"""Calibration results as Markdown."""

from __future__ import annotations

import math

from ..records import Calibration
from .tables import markdown, percent


def calibration_report(found: Calibration) -> str:
    """A table a split of means over the tasks, then likelihood and calibration error by task on the last split."""
    names = {"mean": "mean (the merge)", "ensemble": f"ensemble of {found.samples}", "temperature": "temperature"}
    parts = []
    for split in found.splits:
        lines = []
        for model in found.MODELS:
            rows, mean = found.of(model, split), found.mean(model, split)
            error = math.sqrt(sum(r.accuracy * (1 - r.accuracy) / r.n for r in rows)) / len(rows)
            cells = [percent(mean.accuracy, error), f"{mean.nll:.4f}", percent(mean.ece)]
            lines.append([names.get(model, model), *cells])
        size = f"{len(rows)} tasks, n = {mean.n}"
        parts += [
            f"## {split.capitalize()} ({size})",
            markdown(["model", "accuracy (%)", "NLL", "ECE (%)"], lines),
        ]
    parts += [f"## NLL and ECE (%) by task, {split}", _by_task(found, split), _footer(found)]
    return "\n\n".join(parts) + "\n"


def _by_task(found: Calibration, split: str) -> str:
    columns = [found.of(model, split) for model in found.MODELS]
    header = ["task", "n", *(f"{m} {what}" for what in ("NLL", "ECE") for m in found.MODELS)]
    lines = [
        [rows[0].task, str(rows[0].n), *(f"{r.nll:.3f}" for r in rows), *(percent(r.ece) for r in rows)]
        for rows in zip(*columns, strict=True)
    ]
    return markdown(header, lines)


def _footer(found: Calibration) -> str:
    noise = (
        f"sigma {found.sigma:.4g}: noise of {found.noise:.2g} times the task vector's size"
        if found.sigma
        else "sigma 0: no noise lowered the validation NLL, so the ensemble is the mean"
    )
    heat = ", ".join(f"{task} {value:.2f}" for task, value in found.temperatures.items())
    return f"{noise} ({len(found.search) - 1} values tried)\ntemperatures: {heat}"
