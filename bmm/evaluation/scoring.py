"""Scores of a model given as tensors by name: parameters are swapped into one skeleton, nothing is copied."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import BmmError, RecipeError
from ..notation import Tensors
from ..records import Score
from .skeleton import may_be_absent
from .task import Split, Task, to_device

AUTOCAST = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def state_slots(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a skeleton by name, tied ones under each of their names."""
    persistent = set(model.state_dict(keep_vars=True))
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {name: tensor for name, tensor in named.items() if name in persistent}


def own_names(model: nn.Module, names: Iterable[str], in_model: Mapping[str, str]) -> set[str]:
    """The model's names of the stored ``names`` that it has a place for."""
    slots = state_slots(model)
    return {own for own in (in_model.get(n, n) for n in names) if own in slots}


def check_skeleton(
    model: nn.Module, names: Sequence[str], shapes: Mapping[str, Sequence[int]], skip: Sequence[str] = ()
) -> None:
    """Refuse a skeleton whose parameters are not exactly the checkpoint's. Raises `RecipeError` naming the first.

    It may have parameters that match the patterns ``skip``: these become NaN, for no one to take them for a head.
    """
    slots = state_slots(model)
    storage = {id(t): n for n, t in slots.items() if n in shapes}
    missing = [n for n, t in slots.items() if n not in shapes and id(t) not in storage]
    for name in [n for n in missing if any(fnmatch.fnmatchcase(n, pattern) for pattern in skip)]:
        missing.remove(name)
        if slots[name].is_floating_point():
            slots[name].data.fill_(float("nan"))
    extra = [n for n in names if n not in slots and not may_be_absent(model, n)]
    wrong = [n for n in names if n in slots and tuple(slots[n].shape) != tuple(shapes[n])]
    for kind, found in (
        ("the model has parameters the checkpoints lack", missing),
        ("the checkpoints have parameters the model lacks", extra),
        ("parameters differ in shape between model and checkpoints", wrong),
    ):
        if found:
            more = f" and {len(found) - 4} more" if len(found) > 4 else ""
            raise RecipeError(
                f"{kind}: {', '.join(found[:4])}{more}",
                "the model function must build exactly the architecture of the checkpoints "
                "(leave heads out of both with skip, apply them in the task's forward)",
            )


@contextlib.contextmanager
def swapped(model: nn.Module, tensors: Tensors, device: torch.device | str = "cpu") -> Iterator[nn.Module]:
    """The skeleton with ``tensors`` in place of its own storage; restored on exit. No module is built or copied."""
    slots = state_slots(model)
    kept = {name: slot.data for name, slot in slots.items()}
    training = model.training
    try:
        for name, slot in slots.items():
            if name in tensors:
                # The skeleton's dtype decides, so that a float16 checkpoint is computed in the model's float32.
                slot.data = tensors[name].to(device=device, dtype=slot.dtype)
        model.eval()
        yield model
    finally:
        for name, slot in slots.items():
            slot.data = kept[name]
        model.train(training)


def score_tasks(
    model: nn.Module,
    tensors: Tensors,
    tasks: Sequence[Task],
    split: Split = "validation",
    *,
    device: torch.device | str = "cpu",
    autocast: str = "none",
    progress: Callable[[str], None] | None = None,
    each: Callable[[str, Tensor], None] | None = None,
) -> list[Score]:
    """Score one model (``tensors`` in ``model``) on each task.

    Args:
        model: skeleton; left as it was.
        autocast: "none", "bfloat16" or "float16".
        progress: called with each finished task's name.
        each: called with a task's name and the scores of a batch's inputs, (n,), batch by batch.

    Raises:
        RecipeError: a task's forward or score fails or returns the wrong length, with the task's name.
    """
    if autocast not in AUTOCAST:
        raise RecipeError(f"no autocast {autocast!r}", f"one of {', '.join(AUTOCAST)}")
    kind = torch.device(device).type
    dtype = AUTOCAST[autocast]
    scores = []
    with swapped(model, tensors, device), torch.inference_mode():
        for task in tasks:
            total: Tensor | float = 0.0  # on the device until the task is done: no batch waits for another
            count = 0
            for inputs, targets in task.batches(split):
                with torch.autocast(kind, dtype, enabled=dtype is not None):
                    per_input = _score_batch(model, task, to_device(inputs, device), to_device(targets, device))
                total = total + per_input.sum()
                if each:
                    each(task.name, per_input)
                count += len(targets)
            scores.append(Score(task.name, float(total) / count, count))
            if progress:
                progress(task.name)
    return scores


@contextlib.contextmanager
def failing_by_name(task: Task) -> Iterator[None]:
    """Turn whatever a user's function raises inside into a `RecipeError` with the task's name."""
    try:
        yield
    except (BmmError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RecipeError(
            f"task {task.name!r} failed on a batch: {type(error).__name__}: {error}",
            "check the task's forward and score on one batch of its data",
        ) from error


def _score_batch(model: nn.Module, task: Task, inputs: object, targets: Tensor) -> Tensor:
    with failing_by_name(task):
        per_input = task.score(task.forward(model, inputs), targets).double()
    if per_input.shape != targets.shape[:1]:
        raise RecipeError(
            f"task {task.name!r}: score returned shape {tuple(per_input.shape)} for {len(targets)} inputs",
            "score(outputs, targets) must return one number an input",
        )
    return per_input
