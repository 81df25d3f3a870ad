"""The checkpoints of one training run: found, put in order of their steps, known to agree."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import CheckpointError, RecipeError, did_you_mean

ORDERS = ("step", "given")


def open_run(given: Sequence[str | Path], order: str = "step") -> list[Checkpoint]:
    """Open the checkpoints, oldest first; no tensor is read.

    Args:
        given: checkpoint folders or files, glob patterns of them, or a training run's folder with ``checkpoint-STEP``
            folders in it.
        order: "step" sorts by the last number in each name where every name has one, and keeps the given order where
            none has; "given" keeps it always.

    Raises:
        RecipeError: nothing matches, names from which no order follows, one checkpoint given twice.
        CheckpointError: a checkpoint cannot be read, or differs from the newest in names, shapes or kinds.
    """
    if order not in ORDERS:
        raise RecipeError(f"no order {order!r}", did_you_mean(order, ORDERS))
    paths = [path for item in ([given] if isinstance(given, str | Path) else given) for path in _expand(item)]
    if not paths:
        raise RecipeError("no checkpoints to average", "give folders, files, a glob, or a run's folder")
    seen: set[Path] = set()
    for path in paths:
        if (real := path.resolve()) in seen:
            raise RecipeError(f"{path} is given twice", "give each checkpoint once")
        seen.add(real)
    checkpoints = [open_checkpoint(path) for path in (_by_step(paths) if order == "step" else paths)]
    for checkpoint in checkpoints[:-1]:
        _require_same(checkpoints[-1], checkpoint)
    return checkpoints


def step_of(path: Path) -> int | None:
    """The last number in a checkpoint's name: ``run/checkpoint-500`` -> 500; None without one."""
    numbers = re.findall(r"\d+", path.name if path.is_dir() else path.stem)
    return int(numbers[-1]) if numbers else None


def _expand(item: str | Path) -> list[Path]:
    path = Path(item).expanduser()
    if path.is_dir():
        inside = [p for p in path.glob("checkpoint-*") if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name)]
        return sorted(inside) or [path]
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    found = [Path(p) for p in sorted(glob.glob(str(path)))]
    if not found:
        raise RecipeError(f"nothing matches {item}", "check the pattern; quote it, or let the shell expand it")
    return found


def _by_step(paths: list[Path]) -> list[Path]:
    steps = [(step_of(path), path) for path in paths]
    without = [path for step, path in steps if step is None]
    if without:
        if len(without) < len(paths):
            raise RecipeError(
                f"{without[0]} has no step number in its name, others have one", "name them alike, or use order: given"
            )
        return paths
    first: dict[int, Path] = {}
    for step, path in steps:
        assert step is not None
        if step in first:
            raise RecipeError(f"{first[step]} and {path} are both of step {step}", "drop one, or use order: given")
        first[step] = path
    return [first[step] for step in sorted(first)]


def _require_same(newest: Checkpoint, other: Checkpoint) -> None:
    """Names, shapes and kinds must be the newest checkpoint's."""
    hint = "average checkpoints of one run only; leave this one out"
    for names, what in ((set(newest) - set(other), "lacks"), (set(other) - set(newest), "has the further")):
        if names:
            raise CheckpointError(f"{other.path} {what} {_some(names)}, compared with {newest.path}", hint)
    for name in newest.names:
        ours, theirs = newest.info(name), other.info(name)
        if ours.shape != theirs.shape or ours.floating != theirs.floating:
            raise CheckpointError(
                f"{name} is {theirs.dtype} {theirs.shape} in {other.path}, {ours.dtype} {ours.shape} in {newest.path}",
                hint,
            )


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
