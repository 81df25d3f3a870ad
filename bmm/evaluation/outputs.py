"""The outputs of a model on a split: kept whole, where one number an input is not enough."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..grams.store import flat
from ..notation import Tensors
from .scoring import AUTOCAST, failing_by_name, swapped
from .task import Split, Task, holds_whole, to_device


class SteadyBatches:
    """The (inputs, targets or None) of a split, batch by batch; every pass must bring what the first one brought.

    What is kept of one pass, such as an expert's outputs, is compared input by input with the next: a loader that
    shuffles would mix them up without a word. Iterating raises `RecipeError` where it does.
    """

    def __init__(self, task: Task, split: Split) -> None:
        self.task, self.split = task, split
        self._fixed = holds_whole(getattr(task, split))
        self._first: list[bytes] | None = None

    def __iter__(self) -> Iterator[tuple[Any, Tensor | None]]:
        seen: list[bytes] = []
        for inputs, targets in self.task.pairs(self.split):
            if not self._fixed:
                seen.append(_digest(inputs))
                if self._first is not None and seen[-1:] != self._first[len(seen) - 1 : len(seen)]:
                    raise self._unsteady()
            yield inputs, targets
        if self._first is not None and len(seen) != len(self._first):
            raise self._unsteady()
        self._first = seen

    def _unsteady(self) -> RecipeError:
        return RecipeError(
            f"the {self.split} data of task {self.task.name!r} change from one pass to the next",
            "give the same batches in the same order every time: no shuffle, no random augmentation",
        )


def task_outputs(
    model: nn.Module,
    tensors: Tensors,
    task: Task,
    batches: Iterable[tuple[Any, Any]],
    *,
    device: torch.device | str = "cpu",
    autocast: str = "none",
    finite: bool = True,
) -> list[Tensor]:
    """What ``tensors`` in ``model`` give for the inputs of each batch, on the CPU and in their own dtype.

    Raises `RecipeError` where the task's forward fails, or gives no logits: floating numbers (n, ..., classes), which
    are to be ``finite`` unless the model may be a broken one.
    """
    dtype, found = AUTOCAST[autocast], []
    with swapped(model, tensors, device), torch.inference_mode():
        for inputs, _ in batches:
            with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None), failing_by_name(task):
                outputs = task.forward(model, to_device(inputs, device))
            _require_logits(task, outputs, finite)
            found.append(outputs.cpu())
    return found


def _require_logits(task: Task, outputs: Any, finite: bool) -> None:
    if not isinstance(outputs, Tensor):
        what = type(outputs).__name__
    elif not outputs.is_floating_point() or outputs.dim() < 2 or outputs.shape[-1] < 2:
        what = f"{outputs.dtype} of shape {tuple(outputs.shape)}"
    elif finite and not bool(torch.isfinite(outputs).all()):
        what = "numbers that are not finite"
    else:
        return
    raise RecipeError(
        f"task {task.name!r} has no class probabilities: its forward gives {what}",
        "forward must return logits (n, classes) where probabilities are compared",
    )


def _digest(inputs: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in flat(inputs):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
