"""Tasks judged by a function of the whole model: the user's own, or a run of lm-evaluation-harness."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Harness:
    """A judge: the mean of one metric over tasks of lm-evaluation-harness (``pip install 'bmm-tuner[lm-eval]'``).

    Args:
        tasks: names the harness knows.
        tokenizer: the folder the tokenizer is loaded from.
        metric: "acc", "acc_norm", "exact_match", ...; higher is better.
        first, last: documents of each task to use, [first, last): disjoint ranges keep validation and test apart.
        shots: examples in the prompt.
        batch_size: of the harness.
    """

    tasks: tuple[str, ...]
    tokenizer: str | Path
    metric: str = "acc"
    first: int = 0
    last: int = 100
    shots: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        """Refuse at once what cannot run: the harness not installed, no task, an empty range."""
        if not self.tasks or not 0 <= self.first < self.last:
            raise RecipeError(f"lm_eval: tasks {list(self.tasks)}, documents {self.first} to {self.last}", "give both")
        _harness()

    def __call__(self, model: nn.Module) -> float:
        lm_eval, wrapper = _harness()
        wrapped = wrapper(pretrained=model, tokenizer=_tokenizer(self.tokenizer), batch_size=self.batch_size)
        found = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(self.tasks),
            num_fewshot=self.shots,
            samples={task: list(range(self.first, self.last)) for task in self.tasks},
            bootstrap_iters=0,
            log_samples=False,
        )
        return sum(self._value(found["results"], task) for task in self.tasks) / len(self.tasks)

    def _value(self, results: dict[str, Any], task: str) -> float:
        values = {k.partition(",")[0]: v for k, v in results.get(task, {}).items() if isinstance(v, int | float)}
        if self.metric not in values:
            raise RecipeError(f"lm_eval: {task} has no metric {self.metric!r}", f"it has {', '.join(values)}")
        return float(values[self.metric])


def _harness() -> tuple[Any, Any]:
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise RecipeError("lm_eval tasks need lm-evaluation-harness", "pip install 'bmm-tuner[lm-eval]'") from error
    return lm_eval, HFLM


def _tokenizer(folder: str | Path) -> Any:
    from .text import load_tokenizer

    return load_tokenizer(folder)


def harness_task(
    name: str,
    tasks: Sequence[str],
    tokenizer: str | Path,
    *,
    metric: str = "acc",
    validation: tuple[int, int] = (0, 100),
    test: tuple[int, int] | None = None,
    shots: int = 0,
    batch_size: int = 8,
) -> Task:
    """A task scored by lm-evaluation-harness on the documents [first, last) of each of ``tasks``, see `Harness`.

    Raises `RecipeError` where the harness is not installed, or the two ranges overlap.
    """
    if test is not None and max(validation[0], test[0]) < min(validation[1], test[1]):
        raise RecipeError(f"lm_eval: documents {validation} and {test} overlap", "test what the search has not seen")

    def judge(span: tuple[int, int]) -> Harness:
        return Harness(tuple(tasks), tokenizer, metric, *span, shots=shots, batch_size=batch_size)

    return function_task(name, judge(validation), judge(test) if test else None)
