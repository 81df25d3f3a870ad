"""Checkpoints out: streamed into safetensors shards, complete or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import WriteError
from ..linalg import all_finite
from .atomic import atomic_folder, destination, sync, writing
from .formats import SUPPORTED, TensorInfo, some
from .reader import Checkpoint
from .shards import Shards
from .tied import union

MAX_SHARD_BYTES = 5_000_000_000
Pairs = Iterable[tuple[str, Tensor]]
Source = Mapping[str, Tensor] | Pairs | Callable[[frozenset[str]], Pairs]


def write_checkpoint(
    folder: str | Path,
    tensors: Source,
    *,
    like: Checkpoint | None = None,
    dtypes: Mapping[str, torch.dtype] | torch.dtype | None = None,
    tied: Iterable[Iterable[str]] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_files: Mapping[str, str | bytes] | None = None,
    overwrite: bool = False,
    owned: bool = False,
    key: int | None = None,
) -> Path:
    """Write tensors as a Hugging Face folder and return its path.

    Args:
        folder: the folder to make. It is written beside its place and renamed there as the last step.
        tensors: name and tensor, taken one after the other; or a function that gives them, called with the names that
            are there already (see ``key``) and may be left out. With ``like`` each is written as it comes and none is
            held; without, no more than one shard of them.
        like: the checkpoint whose names, shapes, dtypes and side files (config, tokenizer, ...) the result takes. Every
            name of it must be given; further names are written too, to a shard of their own.
        dtypes: one dtype for all floating tensors, or dtypes by name; ``like``'s, else the tensor's own, for the rest.
            Where the floating tensors all get one dtype, config.json is made to say so.
        tied: groups of names that are one parameter, in addition to ``like.tied``. One name of a group is enough; the
            weight is stored under those names of its group that ``like`` stores (all of them without ``like``), so
            what a model stored once stays stored once.
        max_shard_bytes: one ``model.safetensors`` up to this size, else numbered shards and an index.
        extra_files: further files (a model card, a recipe) by name; they replace side files of the same name.
        overwrite: replace an existing folder of model files, at the end, when the new one is complete.
        owned: nobody else uses the tensors: where they are held, it is without a copy.
        key: stands for all that the result depends on. With ``like`` the shards that are finished when the write fails
            or is stopped are kept, and a later write to the same folder with the same key goes on from there.

    Raises `WriteError`, and leaves nothing behind, where the folder is taken or cannot be written, a value does not fit
    its dtype (float16 ends at 65504), is NaN or Inf, or names are missing or given twice. Errors of the ``tensors``
    iterable pass through, and leave nothing behind either. (With a ``key``: nothing that looks complete.)
    """
    extras = dict(extra_files or {})
    _check_extras(extras)
    if max_shard_bytes <= 0:
        raise WriteError(f"max_shard_bytes is {max_shard_bytes}", "give a positive number of bytes")
    if isinstance(dtypes, torch.dtype) and (not dtypes.is_floating_point or dtypes not in SUPPORTED.values()):
        raise WriteError(f"{dtypes} is no dtype for weights", "use float32, float16, bfloat16 or float64")
    target = destination(folder, overwrite, (like.path,) if like is not None else ())
    ties = {n: group for group in union([*tied, *(like.tied if like is not None else ())]) for n in group}
    with atomic_folder(target, overwrite, key if like is not None else None) as temporary:
        shards = Shards(temporary, target, max_shard_bytes, _plan(like, dtypes) if like is not None else {})
        try:
            for name, tensor in _named(tensors(shards.done) if callable(tensors) else tensors):
                _check_shape(name, tensor, like)
                copy = not owned and name not in shards.plan  # what is written at once needs none
                cast = _cast(name, tensor, _dtype(name, tensor, like, dtypes), copy)
                shards.add(name, cast, ties.get(name, ()), _stored_names(name, ties.get(name, ()), like))
            missing = [name for name in like.names if name not in shards] if like is not None else []
            if missing:
                raise WriteError(
                    f"{len(missing)} tensors of {like} were not given: {some(missing)}", "give every tensor"
                )
            shards.finish()
        finally:
            shards.close()
        if like is not None:
            with writing(target):
                _copy_side_files(like, temporary, shards.floating_dtypes)
        with writing(target):
            for file_name, content in extras.items():
                _write(temporary / file_name, content.encode() if isinstance(content, str) else content)
    return target


def _named(tensors: Mapping[str, Tensor] | Pairs) -> Iterator[tuple[str, Tensor]]:
    yield from tensors.items() if isinstance(tensors, Mapping) else tensors


def _stored_names(name: str, group: tuple[str, ...], like: Checkpoint | None) -> tuple[str, ...]:
    """The names under which a member of a tied group is stored."""
    return tuple(member for member in group if like is None or member in like) or (name,)


def _plan(like: Checkpoint, dtypes: Mapping[str, torch.dtype] | torch.dtype | None) -> dict[str, TensorInfo]:
    """Shape and dtype of every tensor to be written, in ``like``'s order."""
    plan = {}
    for name in like.names:
        dtype = like.info(name).dtype
        if isinstance(dtypes, torch.dtype):
            dtype = dtypes if dtype.is_floating_point else dtype
        elif dtypes is not None:
            dtype = dtypes.get(name, dtype)
        plan[name] = TensorInfo(like.info(name).shape, dtype)
    return plan


def _dtype(
    name: str, tensor: Tensor, like: Checkpoint | None, dtypes: Mapping[str, torch.dtype] | torch.dtype | None
) -> torch.dtype:
    if isinstance(dtypes, torch.dtype) and tensor.is_floating_point():
        return dtypes
    if isinstance(dtypes, Mapping) and name in dtypes:
        return dtypes[name]
    return like.info(name).dtype if like is not None and name in like else tensor.dtype


def _cast(name: str, tensor: Tensor, dtype: torch.dtype, copy: bool = True) -> Tensor:
    """The tensor in ``dtype``, contiguous, on the CPU, a ``copy`` if asked; `WriteError` where values would be lost."""
    if dtype not in SUPPORTED.values() or tensor.layout != torch.strided:
        raise WriteError(f"tensor {name!r} cannot be stored as {dtype} ({tensor.layout})", "use dense float or integer")
    if tensor.is_floating_point() != dtype.is_floating_point:
        raise WriteError(f"tensor {name!r} is {tensor.dtype} and cannot become {dtype}", "keep buffers as they are")
    source = tensor.detach().cpu()
    cast = source.to(dtype, copy=copy).contiguous()
    if not dtype.is_floating_point:
        if dtype != source.dtype and not torch.equal(cast.to(source.dtype), source):
            raise WriteError(f"tensor {name!r} holds integers that {dtype} cannot hold", f"store it as {source.dtype}")
        return cast
    if not all_finite(cast):
        if all_finite(source):
            raise WriteError(
                f"tensor {name!r} reaches {float(source.abs().max()):.4g}, more than {dtype} can hold",
                "write it as bfloat16 or float32",
            )
        raise WriteError(f"tensor {name!r} holds NaN or Inf", "the merge failed: check its knobs and inputs")
    return cast


def _check_shape(name: str, tensor: Tensor, like: Checkpoint | None) -> None:
    if like is not None and name in like and like.info(name).shape != tuple(tensor.shape):
        raise WriteError(
            f"tensor {name!r} has shape {tuple(tensor.shape)}, {like.path} has {like.info(name).shape}",
            "the config would not fit: write it without `like`",
        )


def _check_extras(extras: Mapping[str, str | bytes]) -> None:
    for name in extras:
        if not name or name in (".", "..") or any(mark in name for mark in "/\\\0"):
            raise WriteError(f"extra file {name!r} is no plain file name", "extra files lie in the folder itself")
        if name.endswith((".safetensors", ".bin", ".index.json", ".incomplete", ".unfinished")):
            raise WriteError(f"extra file {name!r} would look like weights", "give it another name")


def _copy_side_files(like: Checkpoint, folder: Path, dtypes: set[torch.dtype]) -> None:
    for source in like.side_files():
        copy = folder / source.name
        shutil.copyfile(source, copy)
        sync(copy)
    for name, content in like.replaced_files.items():
        _write(folder / name, content)
    keys = [key for key in ("dtype", "torch_dtype") if key in like.config]
    stored = str(next(iter(dtypes))).removeprefix("torch.") if len(dtypes) == 1 else ""
    changed = [key for key in keys if stored and like.config[key] != stored]
    if changed or (like.replaced_files and like.config):
        config = dict(like.config) | dict.fromkeys(changed, stored)
        _write(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)
