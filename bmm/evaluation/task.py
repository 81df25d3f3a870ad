"""What a task is: its inputs, how a model is run on them, and how one output is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from .padded import Padded, taken

Split = Literal["validation", "test"]
Inputs = Tensor | Mapping[str, Tensor]
"""A batch: one tensor, or tensors by keyword as transformers models take them; the first axis is the input."""


def run_model(model: nn.Module, inputs: Inputs) -> Tensor:
    """Default forward: ``model(inputs)`` or ``model(**inputs)``; of a transformers output the logits."""
    out = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return getattr(out, "logits", out)


def top1(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest of ``outputs`` (n, classes) is at ``targets`` (n,), else 0."""
    return (outputs.argmax(-1) == targets).float()


def categorical(outputs: Tensor, targets: Tensor) -> Tensor:
    """log p of labels ``targets`` (n, ...) under logits ``outputs`` (n, ..., classes), summed over all but the first
    axis -> (n,); labels below 0 (padding) do not count."""
    wide = outputs if outputs.dtype == torch.float64 else outputs.float()
    chosen = wide.log_softmax(-1).gather(-1, targets.long().clamp_min(0).unsqueeze(-1)).squeeze(-1)  # (n, ...)
    return torch.where(targets >= 0, chosen, torch.zeros_like(chosen)).reshape(len(targets), -1).sum(1)


def draw_labels(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """One label (n, ...) a row of logits ``outputs`` (n, ..., classes), drawn on the CPU in the order of the rows."""
    odds = outputs.detach().double().softmax(-1).cumsum(-1)  # (n, ..., classes)
    draws = torch.rand(outputs.shape[:-1], generator=generator, dtype=torch.float64).to(odds.device)
    return (draws.unsqueeze(-1) * odds[..., -1:] >= odds).sum(-1).clamp_max(outputs.shape[-1] - 1)


@dataclass(frozen=True)
class Task:
    """One task the merged model has to do.

    Args:
        name: unique; matched with the experts' names where those are given.
        validation: what the search may look at: ``(inputs, targets)`` held whole, or a sequence of such batches. Inputs
            alone, whole or a sequence of batches, are enough for ``score_by: agreement``.
        test: the same with targets, for the final report; scored once. May be None.
        calibration: unlabelled inputs for data-driven Grams and Fishers, held whole or a sequence of batches; may be
            None. Take them from the training distribution and keep them apart from ``validation``.
        forward: ``forward(model, inputs) -> outputs``; applies the task's own head where there is one.
        score: ``score(outputs, targets)`` -> one score an input, higher is better.
        batch_size: inputs a batch where data are held whole.
        calibration_targets: labels of ``calibration``, one tensor, or one a batch; only Fishers with true labels
            (``fisher: true``) look at them. May be None.
        log_likelihood: ``log_likelihood(outputs, targets)`` -> log p(y | x), one number an input, for Fishers.
        sample: ``sample(outputs, generator)`` -> targets drawn from the model, for Fishers with sampled labels. One
            that fits goes with every ``log_likelihood`` other than the default.
    """

    name: str
    validation: Any
    test: Any = None
    calibration: Any = None
    forward: Callable[[nn.Module, Any], Tensor] = run_model
    score: Callable[[Tensor, Tensor], Tensor] = top1
    batch_size: int = 512
    calibration_targets: Any = None
    log_likelihood: Callable[[Tensor, Tensor], Tensor] = categorical
    sample: Callable[[Tensor, torch.Generator], Tensor] = draw_labels

    def batches(self, split: Split) -> Iterator[tuple[Any, Tensor]]:
        """The split's (inputs, targets), batch by batch. Raises `RecipeError` where there are none, or no labels."""
        hint = ", or tune on the experts' own outputs (score_by: agreement)" if split == "validation" else ""
        for inputs, targets in self.pairs(split):
            if targets is None:
                raise RecipeError(
                    f"the {split} data of task {self.name!r} have no labels",
                    f"give Task(..., {split}=(inputs, targets)){hint}",
                )
            yield inputs, targets

    def pairs(self, split: Split) -> Iterator[tuple[Any, Tensor | None]]:
        """As `batches`, with None for the targets of unlabelled data."""
        data = getattr(self, split)
        if data is None:
            raise RecipeError(f"task {self.name!r} has no {split} data", f"give Task(..., {split}=(inputs, targets))")
        count = 0
        for inputs, targets in _pairs(data, self.batch_size, f"{split} data of task {self.name!r}"):
            count += batch_length(inputs) if targets is None else len(targets)
            yield inputs, targets
        if count == 0:
            raise RecipeError(f"task {self.name!r} has empty {split} data", "give at least one input")

    def calibration_batches(self, most: int | None = None, batch_size: int = 64) -> Iterator[Any]:
        """Calibration inputs in batches, the first ``most`` of them. Raises `RecipeError` where there are none."""
        if self.calibration is None:
            raise RecipeError(
                f"task {self.name!r} has no calibration inputs",
                "give Task(..., calibration=inputs), or use data-free Grams (grams: datafree)",
            )
        left = most
        for batch in _unlabelled(self.calibration, batch_size):
            size = batch_length(batch)
            if left is not None and size > left:
                batch, size = taken(batch, slice(left)), left
            if size == 0:
                return
            yield batch
            if left is not None:
                left -= size

    def labelled_calibration(self, most: int | None = None, batch_size: int = 64) -> Iterator[tuple[Any, Tensor]]:
        """As `calibration_batches`, each with its targets. Raises `RecipeError` where there are none or too few."""
        if self.calibration_targets is None:
            raise RecipeError(
                f"task {self.name!r} has no calibration targets",
                "give Task(..., calibration_targets=labels), or draw labels from the model (fisher: sampled)",
            )
        whole = self.calibration_targets if isinstance(self.calibration_targets, Tensor) else None
        each = iter(()) if whole is not None else iter(self.calibration_targets)
        start = 0
        for inputs in self.calibration_batches(most, batch_size):
            size = batch_length(inputs)
            targets = next(each, torch.empty(0))[:size] if whole is None else whole[start : start + size]
            if len(targets) != size:
                raise RecipeError(
                    f"task {self.name!r}: {len(targets)} calibration targets for a batch of {size} inputs",
                    "give one target an input: one tensor for all, or one a batch where inputs come in batches",
                )
            yield inputs, targets
            start += size

    def require_labels(self, kind: str) -> None:
        """Refuse what a Fisher with labels of this kind ("sampled" or "true") cannot be made of, before any work."""
        if kind == "true":
            next(self.labelled_calibration(1), None)
        elif self.log_likelihood is not categorical and self.sample is draw_labels:
            raise RecipeError(
                f"task {self.name!r} has its own log_likelihood, but no way to sample targets from it",
                "give Task(..., sample=function) too, or labelled calibration inputs and fisher: true",
            )


def batch_length(inputs: Any) -> int:
    """Number of inputs in a batch."""
    if isinstance(inputs, Mapping):
        return len(next(iter(inputs.values())))
    return len(inputs)


def _is_whole(inputs: Any) -> bool:
    return isinstance(inputs, Tensor | Mapping)


def holds_whole(data: Any) -> bool:
    """Whether a split is held whole, as ``inputs`` or ``(inputs, targets)``, rather than in batches."""
    return _is_whole(data) or (isinstance(data, tuple) and len(data) == 2 and _is_whole(data[0]))


def _pairs(data: Any, size: int, what: str) -> Iterator[tuple[Any, Tensor | None]]:
    if isinstance(data, Iterator):
        raise RecipeError(f"{what} is a one-time iterator", "give a list, a DataLoader or (inputs, targets)")
    if _is_whole(data):
        for index in _indices(data, size):
            yield taken(data, index), None
    elif holds_whole(data):
        inputs, targets = data
        if batch_length(inputs) != len(targets):
            raise RecipeError(
                f"{what}: {batch_length(inputs)} inputs but {len(targets)} targets", "give one target an input"
            )
        for index in _indices(inputs, size):
            yield taken(inputs, index), targets[index]
    else:
        for batch in data:
            parts = (batch,) if _is_whole(batch) else tuple(batch)
            if len(parts) not in (1, 2):
                raise RecipeError(f"{what}: a batch of {len(parts)} parts", "a batch is inputs, or (inputs, targets)")
            yield parts[0], parts[1] if len(parts) == 2 else None


def _unlabelled(data: Any, size: int) -> Iterator[Any]:
    if _is_whole(data):
        for start in range(0, batch_length(data), size):
            yield taken(data, slice(start, start + size))
    else:
        yield from data


def _indices(inputs: Any, size: int) -> Iterator[Tensor | slice]:
    """Which inputs of those held whole make each batch: one after the other, padded ones by length."""
    if isinstance(inputs, Padded):
        yield from inputs.by_length(size)
    else:
        yield from (slice(start, start + size) for start in range(0, batch_length(inputs), size))


def to_device(inputs: Any, device: torch.device | str) -> Any:
    """Move a batch, whatever its structure of tensors."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    if isinstance(inputs, Mapping):
        return {k: to_device(v, device) for k, v in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(to_device(v, device) for v in inputs)
    return inputs


def check_tasks(tasks: Iterable[Task], experts: Sequence[str] | None = None, labels: bool = True) -> list[Task]:
    """Refuse what cannot work before anything is computed: types, names, empty splits, tasks without expert.

    Without ``labels`` validation data need none; test data, where there are any, always do.
    """
    if not isinstance(tasks, Iterable):
        raise RecipeError(f"expected a list of bmm.Task, got {type(tasks).__name__}", "return a list of bmm.Task")
    listed = list(tasks)
    for task in listed:
        if not isinstance(task, Task):
            raise RecipeError(f"expected bmm.Task, got {type(task).__name__}", "return a list of bmm.Task")
    names = [t.name for t in listed]
    if not listed:
        raise RecipeError("no tasks", "the tasks function must return at least one bmm.Task")
    if len(set(names)) < len(names):
        raise RecipeError(f"two tasks share a name: {', '.join(names)}", "give each task its own name")
    if experts is not None and sorted(names) != sorted(experts):
        raise RecipeError(
            f"tasks {', '.join(names)} do not match experts {', '.join(experts)}",
            "give one expert a task, by the same names (experts: {name: path})",
        )
    for task in listed:
        next(iter(task.batches("validation") if labels else task.pairs("validation")))
        if task.test is not None:
            next(task.batches("test"))
    return listed
