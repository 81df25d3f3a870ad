"""What every weight file offers the reader, and the checks that hold for each of them."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError

SUPPORTED: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
"""The dtypes read and written, by their safetensors names: no complex, no 8-bit floats, which need their scales."""

DTYPE_HINT = "convert the checkpoint to float32, float16 or bfloat16 weights and integer or bool buffers first"


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def floating(self) -> bool:
        return self.dtype.is_floating_point

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        return cls(tuple(tensor.shape), tensor.dtype)


class TensorFile(Protocol):
    """One file of named tensors, checked when opened, read tensor by tensor."""

    path: Path
    infos: dict[str, TensorInfo]
    ties: tuple[tuple[str, ...], ...]
    """Groups of names that the file itself stores as one tensor."""

    def read(self, name: str) -> Tensor:
        """A fresh contiguous CPU tensor that the caller owns; `CheckpointError` where the file has changed."""
        ...

    def read_piece(self, name: str, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` of the flattened tensor, (stop - start,), else as `read`."""
        ...

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """The flattened tensor from entry ``start`` on, into all of ``out`` (n,), of its dtype and on the CPU."""
        ...


@dataclass(frozen=True)
class FileStamp:
    """Size and modification time of a file when it was checked: what was validated is what must be read."""

    size: int
    modified: int

    @classmethod
    def take(cls, path: Path) -> FileStamp:
        """Stamp of a regular, readable, non-empty file; `CheckpointError` for anything else."""
        try:
            status = path.stat()
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file", "check the path") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: cannot be read ({reason(error)})", "check the path and its rights"
            ) from None
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file", "give a checkpoint folder or a weight file")
        if status.st_size == 0:
            raise CheckpointError(f"{path}: the file is empty", "download or save it again")
        return cls(status.st_size, status.st_mtime_ns)

    def check(self, path: Path, descriptor: int | None = None) -> None:
        """Raise `CheckpointError` where the file is gone or no longer the one that was opened."""
        try:
            status = os.fstat(descriptor) if descriptor is not None else path.stat()
        except OSError as error:
            raise CheckpointError(
                f"{path}: can no longer be read ({reason(error)})", "restore it and start again"
            ) from None
        if (status.st_size, status.st_mtime_ns) != (self.size, self.modified):
            raise CheckpointError(
                f"{path}: changed after it was opened", "leave inputs alone during a run; start again"
            )


def reason(error: BaseException) -> str:
    """An error's first line, for messages that must stay on one."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = text.strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a small text file; `CheckpointError` where it is none."""
    FileStamp.take(path)
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a valid {what} ({reason(error)})", "download or save it again") from None


def parse_json(raw: bytes) -> dict[str, Any]:
    """A JSON object from UTF-8 bytes; `ValueError` for anything else, repeated keys included."""
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(parsed, dict):
        raise ValueError("not a JSON object")
    return parsed


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {repeated!r} appears twice")
    return unique


def check_name(path: Path, name: Any) -> None:
    """Raise `CheckpointError` unless ``name`` is a usable tensor name: non-empty text that UTF-8 can hold."""
    try:
        if isinstance(name, str) and name.encode("utf-8"):
            return
    except UnicodeEncodeError:
        pass
    raise CheckpointError(f"{path}: {name!r} is no tensor name", "save the model's state_dict: tensors by name")


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, shapes, dtypes and bytes, in order of names, one tensor in memory at a time.

    The same for the same tensors whatever files, shards or devices hold them.
    """
    digest = hashlib.sha256(b"bmm tensors 1\n")
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode() + b"\n")
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy; writing to it writes to the tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def some(items: Iterable[Any], limit: int = 3) -> str:
    """The first few items for a message: "a, b, c and 4 more"."""
    items = list(items)
    shown = ", ".join(str(item) for item in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
