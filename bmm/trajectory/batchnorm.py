"""BatchNorm statistics of an averaged model: they belong to its own activations (arXiv 1803.05407, SWA)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import BmmError, RecipeError
from ..evaluation import Task, swapped
from ..evaluation.task import batch_length, to_device
from ..notation import StateDict

STATISTICS = (".running_mean", ".running_var")


def statistics_names(names: Iterable[str]) -> list[str]:
    """The names that hold BatchNorm means and variances."""
    return [name for name in names if f".{name}".endswith(STATISTICS)]


def measure(
    model: nn.Module,
    tensors: StateDict,
    tasks: Sequence[Task],
    most: int | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> StateDict:
    """Running means and variances of the model with ``tensors``, over the tasks' calibration inputs.

    As ``torch.optim.swa_utils.update_bn``: cumulative averages over the batches, from zero. Only the BatchNorm layers
    are in training mode, so that dropout stays off. ``tensors`` carry the model's names and are left as they are.

    Args:
        most: calibration inputs a task, all by default; batches are of ``Task.batch_size``.

    Raises:
        RecipeError: no calibration inputs, no BatchNorm layer in the model, or a task that fails on a batch.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms:
        raise RecipeError(f"{type(model).__name__} has no BatchNorm layer with statistics", "use batchnorm: last")
    own = {f"{name}.{buffer}" for name, module in norms.items() for buffer, _ in module.named_buffers()}
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
            return {
                f"{name}{statistic}": getattr(module, statistic[1:]).detach().cpu().clone()
                for name, module in norms.items()
                for statistic in STATISTICS
            }
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
