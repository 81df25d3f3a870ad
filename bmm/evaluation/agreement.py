"""Agreement with the experts: a score of the merged model that needs inputs, but no labels.

One minus the Jensen-Shannon divergence between the class probabilities of the merged model and those of the task's own
expert, in bits, so that it lies in [0, 1] and the expert itself has 1. DivMerge (arXiv 2509.02108) minimises the same
divergence by gradient; here it is what the search observes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..notation import Tensors
from .outputs import SteadyBatches
from .task import Task

Outputs = Callable[[Tensors, Task, SteadyBatches], list[Tensor]]


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """The divergence in bits between the softmax of two tensors of logits (..., classes): (...), in [0, 1].

    Symmetric, and 0 exactly where both are equal. In float64.
    """
    p, q = first.double().softmax(-1), second.double().softmax(-1)
    middle = ((p + q) / 2).clamp_min(torch.finfo(torch.float64).tiny)  # 0 log (0 / 0) is 0
    terms = torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)  # (..., classes)
    return (terms.sum(-1) / (2 * math.log(2))).clamp(0, 1)


def agreement(outputs: Tensor, expert: Tensor) -> Tensor:
    """``1 - jensen_shannon`` of each input: logits (n, ..., classes) -> (n,), the mean over the axes between, but for
    places where the expert's are NaN."""
    return (1 - jensen_shannon(outputs, expert)).reshape(len(outputs), -1).nanmean(1)


def _without_padding(logits: Tensor, inputs: Any) -> Tensor:
    """A language model's logits (n, tokens - 1, classes) with NaN for the padding of the inputs."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if logits.dim() != 3 or not isinstance(mask, Tensor) or mask.shape != (len(logits), logits.shape[1] + 1):
        return logits
    return logits.masked_fill((mask[:, 1:] == 0).unsqueeze(-1), math.nan)


class ExpertOutputs:
    """A task's validation inputs, each batch with its expert's logits for targets.

    The expert runs once, when they are first asked for, unless another process had it run and gives the ``logits``;
    these stay in memory (n x classes numbers).
    """

    def __init__(self, task: Task, expert: Tensors, outputs: Outputs) -> None:
        self._task, self._expert, self._outputs = task, expert, outputs
        self._batches = SteadyBatches(task, "validation")
        self.logits: list[Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        if self.logits is None:
            self.logits = self._outputs(self._expert, self._task, self._batches)
        for (inputs, _), logits in zip(self._batches, self.logits, strict=True):
            yield inputs, _without_padding(logits, inputs)


def judged_by_experts(tasks: Sequence[Task], experts: Sequence[Tensors], outputs: Outputs) -> dict[str, Task]:
    """The tasks by name, their validation scores being agreement with the expert of the same place.

    ``outputs`` gives an expert's logits on a task's batches (`bmm.evaluation.outputs.task_outputs`).
    """
    return {
        task.name: replace(task, validation=ExpertOutputs(task, expert, outputs), score=agreement)
        for task, expert in zip(tasks, experts, strict=True)
    }
