"""A unified model with what turns it back into every task's own: an ordinary checkpoint folder with two files more.

model.safetensors, config.json ...   the unified model, which opens anywhere
masks.safetensors                    name -> uint8 (T, ceil(n / 8)): a bit a task and entry, `numpy.packbits` order
masks.json                           method, tasks, rescalers, and which base the masks stand on
"""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from .atomic import atomic_folder, destination, sync, writing
from .formats import read_json, some
from .layout import inside
from .reader import Checkpoint, open_checkpoint
from .writer import MAX_SHARD_BYTES, write_checkpoint

MASKS, DESCRIPTION, FORMAT = "masks.safetensors", "masks.json", 1
AGAIN = "write it again with `bmm merge --masks`"


@dataclass(frozen=True)
class MaskedFolder:
    """What `open_masked` found: ``masks`` and ``unified`` are read tensor by tensor."""

    method: str
    tasks: tuple[str, ...]
    rescalers: tuple[float, ...]
    masks: Checkpoint
    unified: Checkpoint
    base: Checkpoint


def write_masked(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    masks: Mapping[str, Tensor],
    *,
    method: str,
    tasks: Iterable[str],
    rescalers: Iterable[float],
    base: Checkpoint,
    tied: Iterable[Iterable[str]] = (),
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_files: Mapping[str, str | bytes] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the unified model's ``tensors`` and ``masks``, whole or not at all; options as in `write_checkpoint`.

    Raises `WriteError` as `write_checkpoint` does.
    """
    described = {
        "format": FORMAT,
        "method": method,
        "tasks": list(tasks),
        "rescalers": list(rescalers),
        "base": {
            "path": str(base.path.expanduser().resolve()),
            "fingerprint": base.fingerprint(),
            "skip": [glob.escape(name) for name in base.skipped],
        },
    }
    target = destination(folder, overwrite, (base.path,))
    with atomic_folder(target, overwrite) as whole:
        write_checkpoint(
            whole,
            tensors,
            like=base,
            dtypes=dtype,
            tied=tied,
            max_shard_bytes=max_shard_bytes,
            extra_files={**(extra_files or {}), DESCRIPTION: json.dumps(described, indent=1) + "\n"},
        )
        with writing(target):
            path = whole / MASKS
            path.touch()  # the library's own file would be the owner's alone
            mode = path.stat().st_mode
            save_file(dict(masks), path, metadata={"format": "pt"})
            path.chmod(mode & 0o777)
            sync(path)
    return target


def open_masked(folder: str | Path, base: str | Path | Checkpoint | None = None) -> MaskedFolder:
    """Open what `write_masked` wrote; tensors are read when asked for.

    ``base`` is where the base lies now, where it has moved since. Raises `CheckpointError` where files are missing or
    damaged, do not belong together, or the base is not the one the masks stand on.
    """
    folder = Path(folder).expanduser()
    if not (folder / DESCRIPTION).is_file():
        raise CheckpointError(f"{folder}: no {DESCRIPTION}, so no masks", "give a folder made by `bmm merge --masks`")
    said = read_json(inside(folder, DESCRIPTION), "description of masks")
    method, tasks, rescalers, origin = _described(folder, said)
    unified, masks = open_checkpoint(folder), open_checkpoint(inside(folder, MASKS))
    if not isinstance(base, Checkpoint):
        path = Path(base) if base is not None else Path(origin["path"])
        if base is None and not os.path.exists(path):  # False for impossible names too
            raise CheckpointError(f"{folder}: its base {path} is gone", "say where it is now: --base FOLDER")
        base = open_checkpoint(path, skip=origin["skip"])
    if base.fingerprint() != origin["fingerprint"]:
        raise CheckpointError(f"{base.path}: not the base that {folder} was made from", "give the very same weights")
    for name in masks.names:
        info = masks.info(name)
        count = base.info(name).numel if name in base and name in unified else -1
        if info.dtype != torch.uint8 or info.shape != (len(tasks), math.ceil(count / 8)):
            raise CheckpointError(f"{folder}: the mask of {name!r} does not fit the model", AGAIN)
    masked = {*masks.names, *(name for group in base.tied for name in group[1:])}
    bare = [n for n in base.names if n not in masked and base.info(n).floating and base.info(n).numel]
    if bare:
        raise CheckpointError(f"{folder}: no mask for {some(bare)}", AGAIN)
    return MaskedFolder(method, tasks, rescalers, masks, unified, base)


def _described(folder: Path, said: Mapping[str, Any]) -> tuple[str, tuple[str, ...], tuple[float, ...], dict[str, Any]]:
    """Method, tasks, rescalers and base of a description, checked."""
    if said.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: masks of format {said.get('format')!r}", "use the version that wrote them")
    method, tasks, rescalers, origin = (said.get(key) for key in ("method", "tasks", "rescalers", "base"))
    fits = (
        isinstance(method, str)
        and isinstance(tasks, list)
        and isinstance(rescalers, list)
        and len(tasks) == len(rescalers) == len({str(task) for task in tasks}) > 0
        and all(isinstance(task, str) for task in tasks)
        and all(isinstance(scale, float) and math.isfinite(scale) for scale in rescalers)
        and isinstance(origin, dict)
        and isinstance(origin.get("path"), str)
        and isinstance(origin.get("fingerprint"), str)
        and isinstance(origin.get("skip"), list)
        and all(isinstance(pattern, str) for pattern in origin["skip"])
    )
    if not fits:
        raise CheckpointError(f"{folder / DESCRIPTION}: damaged", AGAIN)
    assert isinstance(method, str)
    assert isinstance(tasks, list)
    assert isinstance(rescalers, list)
    assert isinstance(origin, dict)
    return method, tuple(tasks), tuple(rescalers), origin
