"""Tasks judged by a function of the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..evaluation import Task

Judge = Callable[[nn.Module], float]


@dataclass(frozen=True)
class _Judged:
    """A forward whose one "input" is the number of the judge to ask."""

    judges: tuple[Judge, ...]

    def __call__(self, model: nn.Module, number: Tensor) -> Tensor:
        value = float(self.judges[int(number[0])](model))
        if not math.isfinite(value):
            raise RecipeError(f"the score function returned {value}", "a finite number, higher is better")
        return torch.tensor([value], dtype=torch.float64)


def _given(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.to(targets.device)


def function_task(name: str, validation: Judge, test: Judge | None = None) -> Task:
    """A task whose score is ``validation(model)``, one finite number, higher is better; ``test`` likewise.

    The model comes with the merged weights in place and in evaluation mode; it is to be left as it is. There are no
    inputs to collect Grams from: use grams: datafree, or give the `Task` calibration inputs of your own.
    """
    judges = tuple(j for j in (validation, test) if j is not None)

    def split(number: int) -> list[tuple[Tensor, Tensor]]:
        return [(torch.tensor([number]), torch.zeros(1))]

    return Task(name, validation=split(0), test=split(1) if test else None, forward=_Judged(judges), score=_given)
