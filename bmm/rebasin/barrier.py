"""The barrier between two models: how much worse the models on the straight line between them are.

For BatchNorm networks the statistics of an interpolated model can be recomputed: interpolated activations have too
small a variance, which the interpolated statistics do not know (REPAIR, arXiv 2211.08403).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RecipeError
from ..evaluation import Task, swapped
from ..evaluation.batchnorm import batchnorms, measure_batchnorm
from ..evaluation.task import to_device
from ..notation import StateDict, Tensors

Loss = Callable[[Tensor, Tensor], Tensor]
"""``loss(outputs, targets)`` -> one loss an input."""


@dataclass(frozen=True)
class Barrier:
    """Losses and scores, means over the tasks, at ``alphas`` from the reference (0) to the expert (1).

    ``losses`` is None where no loss is defined: outputs that are no class logits, and no loss given.
    """

    alphas: tuple[float, ...]
    scores: tuple[float, ...]
    losses: tuple[float, ...] | None

    @property
    def score(self) -> float:
        """Largest drop of the score below the line between the two ends; 0 without any."""
        return max(line - value for line, value in zip(_line(self.alphas, self.scores), self.scores, strict=True))

    @property
    def loss(self) -> float | None:
        """Largest rise of the loss above the line between the two ends (arXiv 2209.04836, definition 2.2)."""
        if self.losses is None:
            return None
        return max(value - line for line, value in zip(_line(self.alphas, self.losses), self.losses, strict=True))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"score_barrier": self.score, "loss_barrier": self.loss}


def _line(alphas: Sequence[float], values: Sequence[float]) -> list[float]:
    return [(1 - a) * values[0] + a * values[-1] for a in alphas]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """``(n,)`` from class logits (n, classes) and class numbers (n,)."""
    return F.cross_entropy(outputs.float(), targets, reduction="none")


def interpolate(reference: Tensors, expert: Tensors, alpha: float) -> StateDict:
    """``(1 - alpha) reference + alpha expert`` in float32 or better; integer buffers are the reference's."""

    def between(a: Tensor, b: Tensor) -> Tensor:
        if not a.is_floating_point():
            return a
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        return (1 - alpha) * a.to(wide) + alpha * b.to(wide)

    return {name: between(reference[name], expert[name]) for name in reference}


def measure_barrier(
    model: nn.Module,
    reference: Tensors,
    expert: Tensors,
    tasks: Sequence[Task],
    *,
    points: int = 11,
    loss: Loss | None = None,
    recompute: bool = False,
    device: torch.device | str = "cpu",
) -> Barrier:
    """Loss and score on validation data at ``points`` models from ``reference`` to ``expert``, ends included.

    Args:
        reference, expert: tensors by the model's names.
        loss: one loss an input; by default the cross-entropy where outputs are class logits.
        recompute: BatchNorm statistics of the models between the ends anew, from the tasks' calibration inputs.

    Raises:
        RecipeError: fewer than three points, or ``recompute`` without calibration inputs.
    """
    if points < 3:
        raise RecipeError(f"{points} points from end to end", "at least 3, so that one lies between")
    alphas = [k / (points - 1) for k in range(points)]
    measured = []
    for alpha in alphas:
        tensors = interpolate(reference, expert, alpha)
        if recompute and 0 < alpha < 1:
            tensors = recompute_batchnorm(model, tensors, tasks, device=device)
        measured.append(_losses_and_scores(model, tensors, tasks, loss, device))
    losses = [m[0] for m in measured]
    known = [x for x in losses if x is not None]
    return Barrier(tuple(alphas), tuple(m[1] for m in measured), tuple(known) if len(known) == points else None)


def _losses_and_scores(
    model: nn.Module, tensors: Tensors, tasks: Sequence[Task], loss: Loss | None, device: torch.device | str
) -> tuple[float | None, float]:
    """Means over the tasks, of each task's mean over its validation inputs."""
    losses: list[float | None] = []
    scores = []
    with swapped(model, tensors, device), torch.inference_mode():
        for task in tasks:
            total, count, lost = 0.0, 0, 0.0
            defined = True
            for inputs, targets in task.batches("validation"):
                targets = to_device(targets, device)
                outputs = task.forward(model, to_device(inputs, device))
                total += float(task.score(outputs, targets).double().sum())
                count += len(targets)
                function = loss or (cross_entropy if _is_classification(outputs, targets) else None)
                if function is None:
                    defined = False
                else:
                    lost += float(function(outputs, targets).double().sum())
            scores.append(total / count)
            losses.append(lost / count if defined else None)
    known = [x for x in losses if x is not None]
    return (sum(known) / len(known) if len(known) == len(losses) else None), sum(scores) / len(scores)


def _is_classification(outputs: Tensor, targets: Tensor) -> bool:
    return outputs.dim() == 2 and targets.dim() == 1 and not targets.is_floating_point()


def recompute_batchnorm(
    model: nn.Module, tensors: Tensors, tasks: Sequence[Task], *, device: torch.device | str = "cpu"
) -> StateDict:
    """``tensors`` with BatchNorm's buffers taken anew from all tasks' calibration inputs together.

    One pass in training mode with dropout off, the plain mean of the batches' statistics. A merge of networks with
    BatchNorm needs this: an average of statistics is not the statistics of the average.

    Raises:
        RecipeError: as `bmm.evaluation.batchnorm.measure_batchnorm`; a model without BatchNorm stays as it is.
    """
    if not batchnorms(model):
        return dict(tensors)
    measured = measure_batchnorm(model, tensors, tasks, device=device)
    return {name: measured.get(name, tensor) for name, tensor in tensors.items()}
