"""From splits on disk to a `Task`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import RecipeError
from ..evaluation import Task
from ..evaluation.padded import Padded
from .heads import Head
from .rows import Rows, drawn, open_rows

Load = Callable[[Rows, Sequence[int]], tuple[Any, Tensor]]
"""Reads the rows of these numbers: inputs and targets."""

LIMITS = {"train": 256}
"""Rows read where nothing else is said: calibration takes 64 by default."""


@dataclass(frozen=True)
class Splits:
    """Where a task's data are.

    Args:
        validation: what the search looks at.
        test: for the final report; may be None.
        train: calibration inputs, from the training distribution; may be None. Its labels serve Fishers with true ones.
        limit: rows to read of a split, by its name: drawn at random, the same ones every time (``seed``).
    """

    validation: str | Path
    test: str | Path | None = None
    train: str | Path | None = None
    limit: dict[str, int] = field(default_factory=dict)
    seed: int = 0

    def task(self, name: str, load: Load, calibrate: Load | None = None, **options: Any) -> Task:
        """The task whose splits ``load`` reads; ``calibrate`` reads the calibration split where that is another form.

        Raises `RecipeError` with the task's name and the split for whatever is wrong with the data.
        """
        validation = self._split(name, "validation", load)
        inputs, targets = self._split(name, "train", calibrate or load) if self.train is not None else (None, None)
        return Task(
            name,
            validation=validation,
            test=self._split(name, "test", load) if self.test is not None else None,
            # of one width: what is collected of them depends on no batch size
            calibration=dict(inputs) if isinstance(inputs, Padded) else inputs,
            calibration_targets=targets,
            **options,
        )

    def _split(self, name: str, split: str, load: Load) -> tuple[Any, Tensor]:
        try:
            rows = open_rows(getattr(self, split))
            order = drawn(len(rows), self.limit.get(split, LIMITS.get(split)), self.seed)
            return load(rows, order)
        except RecipeError as error:
            raise RecipeError(f"task {name!r}, {split}: {error.message}", error.hint) from error


def class_count(classes: Sequence[str] | None, head: Head | None, labels: int | None) -> int | None:
    """How many classes there are, by names, head or number. Raises `RecipeError` where names and head disagree."""
    rows = head.classes if head else None
    if classes is not None and rows is not None and len(classes) != rows:
        raise RecipeError(f"{len(classes)} class names for a head of {rows} classes", "name every class of the head")
    return len(classes) if classes is not None else rows if rows is not None else labels
