"""One model from the checkpoints of a training run, streamed from disk to disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, write_checkpoint
from ..checkpoint.atomic import destination
from ..errors import RecipeError, did_you_mean
from ..evaluation import Task, check_skeleton
from ..evaluation.batchnorm import measure_batchnorm
from ..functions import call_function
from ..linalg import require_finite
from ..loading import ModelBuilder, build_model, find_device
from ..notation import StateDict
from ..progress import Progress, silent
from ..recipe import storage_dtype
from ..report import average_card
from .checkpoints import open_run
from .schemes import Scheme

BATCHNORM = ("recompute", "last", "average")
STATISTICS = (".running_mean", ".running_var")


def average(
    checkpoints: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    method: str = "uniform",
    batchnorm: str | None = None,
    tasks: Sequence[Task] | str | None = None,
    model: ModelBuilder | str | None = None,
    calibration: int | None = None,
    device: str = "cpu",
    order: str = "step",
    dtype: str = "same",
    shard_gib: float = 4.0,
    overwrite: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> StateDict | Path | list[Path]:
    """Average the checkpoints of one training run.

    Tensors are read one checkpoint at a time and summed in float64: memory holds one tensor and the shard being
    written, however many checkpoints there are; ``batchnorm="recompute"`` holds the model. Integer buffers are the
    newest checkpoint's, as are tokenizer and configuration.

    Args:
        checkpoints: see `bmm.trajectory.checkpoints.open_run`: folders, files, globs, or a run's folder.
        out: folder of the averaged checkpoint; with ``each``, of one folder a window. Without it tensors are returned.
        method: uniform, ema, lawa or swa; ``options`` are its own, see `Scheme`: last, share, decay, window, interval,
            each.
        batchnorm: what becomes of BatchNorm statistics: "recompute" them on the tasks' calibration inputs (the default
            of swa, and wherever tasks are given), keep the "last" checkpoint's, or "average" them too (the default
            otherwise).
        tasks, model: as in `bmm.tune`; for "recompute" only. The model is built from config.json by default.
        calibration: calibration inputs a task, all by default.
        order: "step" or "given".
        dtype: storage type of the result, the newest checkpoint's by default.

    Returns:
        The path of the checkpoint, a list of them with ``each``, or the tensors by name.

    Raises:
        RecipeError: options that make no sense. CheckpointError: checkpoints that differ or are damaged. MergeError:
        one holds NaN or Inf. WriteError: ``out`` cannot be written. Nothing half-written is left.
    """
    scheme = _scheme(method, options)
    _require_choices(scheme, batchnorm, shard_gib, out)
    kept = storage_dtype(dtype)
    opened = open_run([checkpoints] if isinstance(checkpoints, str | Path) else checkpoints, order)
    plans = scheme.plans(len(opened))
    targets = _targets(out, scheme, [opened[max(plan)] for plan in plans])
    for target in targets:
        destination(target, overwrite, tuple(checkpoint.path for checkpoint in opened))
    policy = _policy(scheme, batchnorm, tasks, model, calibration, device, opened[-1], progress)
    norms = _Norms(policy, calibration, progress)
    if norms.policy == "recompute":
        norms.prepare(opened[-1], tasks, model, device)
    total = len(plans) * len(opened[-1])
    paths = []
    for number, plan in enumerate(plans):
        done = number * len(opened[-1])
        pairs = norms.applied(_counted(_stream(opened, plan), progress, done, total), opened[max(plan)])
        if not targets:
            newest = opened[max(plan)]
            return {n: t.to(_dtype(newest, n, kept)) for n, t in pairs}
        paths.append(_write(targets[number], pairs, opened, plan, scheme, norms.policy, kept, shard_gib, overwrite))
    return paths if scheme.each else paths[0]


def _scheme(method: str, options: Mapping[str, Any]) -> Scheme:
    known = [name for name in Scheme.__dataclass_fields__ if name != "method"]
    for name in options:
        if name not in known:
            raise RecipeError(f"averaging has no option {name!r}", did_you_mean(name, known))
    return Scheme(method, **options)


def _require_choices(scheme: Scheme, batchnorm: str | None, shard_gib: float, out: Any) -> None:
    if batchnorm is not None and batchnorm not in BATCHNORM:
        raise RecipeError(f"no batchnorm {batchnorm!r}", did_you_mean(batchnorm, BATCHNORM))
    if not shard_gib > 0:
        raise RecipeError(f"shard_gib is {shard_gib}", "a size above 0")
    if scheme.each and out is None:
        raise RecipeError("each writes one checkpoint a window", "give out, the folder for them")


def _targets(out: str | Path | None, scheme: Scheme, newest: Sequence[Checkpoint]) -> list[Path]:
    if out is None:
        return []
    if not scheme.each:
        return [Path(out)]
    names = [c.path.name if c.path.is_dir() else c.path.stem for c in newest]
    if len(set(names)) < len(names):
        names = [f"window-{number + 1}" for number in range(len(names))]
    return [Path(out) / name for name in names]


def _stream(opened: Sequence[Checkpoint], plan: Mapping[int, float]) -> Iterator[tuple[str, Tensor]]:
    """The weighted sum, tensor by tensor, in float64; tensors of integers are the newest checkpoint's."""
    newest = opened[max(plan)]
    for name in newest.names:
        info = newest.info(name)
        if not info.floating:
            yield name, newest[name]
            continue
        total = torch.zeros(info.shape, dtype=torch.float64)
        for index, share in plan.items():
            tensor = opened[index][name]
            require_finite(f"{name} of {opened[index].path}", tensor)
            total.add_(tensor, alpha=share)
        yield name, total


def _counted(
    pairs: Iterator[tuple[str, Tensor]], progress: Progress, before: int, total: int
) -> Iterator[tuple[str, Tensor]]:
    for done, (name, tensor) in enumerate(pairs, before + 1):
        yield name, tensor
        progress("average", done, total, name)


def _policy(
    scheme: Scheme,
    batchnorm: str | None,
    tasks: Any,
    model: Any,
    calibration: int | None,
    device: str,
    newest: Checkpoint,
    progress: Progress,
) -> str:
    """What becomes of BatchNorm statistics; "" where the checkpoints have none."""
    policy = batchnorm or ("recompute" if scheme.method == "swa" or tasks is not None else "average")
    given = {"tasks": tasks, "model": model, "calibration": calibration, "device": None if device == "cpu" else device}
    found = _statistics_of(newest.names)
    if policy != "recompute" and (unused := [name for name, value in given.items() if value is not None]):
        raise RecipeError(f"{unused[0]} is for batchnorm: recompute only", f"drop it; batchnorm is {policy}")
    if not found:
        if batchnorm or tasks is not None:
            progress(
                "notice", 1, 1, "the checkpoints hold no BatchNorm statistics; there is nothing to recompute or keep"
            )
        return ""
    if policy == "recompute" and tasks is None:
        raise RecipeError(
            f"{newest.path} holds BatchNorm statistics ({found[0]}), which averaged weights make wrong",
            "give tasks (and model) with calibration inputs to measure them anew, or batchnorm: last",
        )
    if batchnorm is None and policy == "average":
        progress("notice", 1, 1, "BatchNorm statistics are averaged like weights; give tasks to measure them anew")
    return policy


def _statistics_of(names: Sequence[str]) -> list[str]:
    """The names that hold BatchNorm means and variances."""
    return [name for name in names if f".{name}".endswith(STATISTICS)]


class _Norms:
    """What is done to the BatchNorm statistics of an averaged model."""

    def __init__(self, policy: str, most: int | None, progress: Progress) -> None:
        self.policy, self.most, self.progress = policy, most, progress

    def prepare(self, newest: Checkpoint, tasks: Any, model: Any, device: str) -> None:
        """Load the tasks, build the model and check it, before anything is averaged."""
        self.device = find_device(device)
        self.tasks: list[Task] = list(call_function(tasks, "tasks") if isinstance(tasks, str) else tasks)
        if not self.tasks or not all(isinstance(task, Task) for task in self.tasks):
            raise RecipeError("tasks must be a list of bmm.Task", "give at least one, with calibration inputs")
        target = model if isinstance(model, str) else "transformers"
        builder = None if isinstance(model, str) else model
        self.model, names = build_model(builder, target, newest.path, newest)
        self.own = {stored: names.get(stored, stored) for stored in newest.names}
        shapes = {self.own[name]: newest.info(name).shape for name in newest.names}
        check_skeleton(self.model, list(shapes), shapes)
        self.model.to(self.device).eval().requires_grad_(False)

    def applied(self, pairs: Iterator[tuple[str, Tensor]], newest: Checkpoint) -> Iterator[tuple[str, Tensor]]:
        """The averaged tensors, with the statistics that the policy asks for."""
        if self.policy == "recompute":
            tensors = {n: t.to(_dtype(newest, n, None)) for n, t in pairs}  # what will be stored is what is measured
            measured = measure_batchnorm(
                self.model,
                {self.own[n]: t for n, t in tensors.items()},
                self.tasks,
                self.most,
                self.device,
                lambda done, total, name: self.progress("batchnorm", done, total, name),
            )
            statistics = set(_statistics_of(newest.names))  # how many batches there were stays what training counted
            for name, tensor in tensors.items():
                yield name, measured.get(self.own[name], tensor) if name in statistics else tensor
            return
        last = set(_statistics_of(newest.names)) if self.policy == "last" else set()
        for name, tensor in pairs:
            yield name, newest[name] if name in last else tensor


def _dtype(newest: Checkpoint, name: str, asked: torch.dtype | None) -> torch.dtype:
    info = newest.info(name)
    return asked if asked is not None and info.floating else info.dtype


def _write(
    target: Path,
    pairs: Iterator[tuple[str, Tensor]],
    opened: Sequence[Checkpoint],
    plan: Mapping[int, float],
    scheme: Scheme,
    policy: str,
    dtype: torch.dtype | None,
    shard_gib: float,
    overwrite: bool,
) -> Path:
    parts = {str(opened[index].path): share for index, share in sorted(plan.items())}
    return write_checkpoint(
        target,
        pairs,
        like=opened[max(plan)],
        dtypes=dtype,
        max_shard_bytes=int(shard_gib * 2**30),
        extra_files={"README.md": average_card(scheme.method, scheme.options(), parts, policy)},
        overwrite=overwrite,
    )
