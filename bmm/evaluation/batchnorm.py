"""BatchNorm statistics of a merged model: they belong to its own activations, not to an average of others' (SWA, arXiv
1803.05407; REPAIR, arXiv 2211.08403)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import BmmError, RecipeError
from ..notation import StateDict, Tensors
from .scoring import swapped
from .task import Task, batch_length, to_device


def batchnorms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The layers of a model that keep running statistics, by name."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return {name: module for name, module in found.items() if module.running_mean is not None}


def measure_batchnorm(
    model: nn.Module,
    tensors: Tensors,
    tasks: Sequence[Task],
    most: int | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> StateDict:
    """BatchNorm's buffers of the model with ``tensors``, by name, measured on the tasks' calibration inputs.

    As ``torch.optim.swa_utils.update_bn``: cumulative averages over the batches, from zero. Only the BatchNorm layers
    are in training mode, so that dropout stays off. ``tensors`` carry the model's names and are left as they are.

    Args:
        most: calibration inputs a task, all by default; batches are of ``Task.batch_size``.

    Raises:
        RecipeError: no calibration inputs, no BatchNorm layer in the model, or a task that fails on a batch.
    """
    norms = batchnorms(model)
    if not norms:
        raise RecipeError(f"{type(model).__name__} has no BatchNorm layer with statistics", "use batchnorm: last")

    def buffers() -> dict[str, Tensor]:
        return {f"{n}.{buffer}": tensor for n, module in norms.items() for buffer, tensor in module.named_buffers()}

    own = buffers()
    inside = {name: tensor.clone() if name in own else tensor for name, tensor in tensors.items()}
    momenta = {name: module.momentum for name, module in norms.items()}
    with swapped(model, inside, device), torch.no_grad():
        try:
            for module in norms.values():
                module.reset_running_stats()
                module.momentum = None  # the plain mean over batches
                module.train()
            for done, task in enumerate(tasks):
                _run(model, task, most, device)
                if progress:
                    progress(done + 1, len(tasks), task.name)
            return {name: buffer.detach().cpu().clone() for name, buffer in buffers().items()}
        finally:
            for name, module in norms.items():
                module.momentum = momenta[name]


def _run(model: nn.Module, task: Task, most: int | None, device: torch.device | str) -> None:
    if task.calibration is None:
        raise RecipeError(
            f"task {task.name!r} has no calibration inputs to measure BatchNorm statistics on",
            "give Task(..., calibration=inputs), or use batchnorm: last",
        )
    count = 0
    for inputs in task.calibration_batches(most, task.batch_size):
        count += batch_length(inputs)
        try:
            task.forward(model, to_device(inputs, device))
        except (BmmError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise RecipeError(
                f"task {task.name!r} failed on a calibration batch: {type(error).__name__}: {error}",
                "check the task's forward; BatchNorm needs more than one value a channel in every batch",
            ) from error
    if not count:
        raise RecipeError(f"task {task.name!r} has empty calibration inputs", "give at least one batch")
