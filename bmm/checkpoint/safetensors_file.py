"""Safetensors files: a header checked as strictly as the reference implementation does, then plain reads.

Tensors are read with ``readinto`` into their own memory rather than mapped: a file that is truncated while a merge runs
then gives an error instead of a bus error, and pages of tensors long processed do not count as the process's memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .formats import DTYPE_HINT, SUPPORTED, FileStamp, TensorInfo, as_bytes, check_name, parse_json, reason

MAX_HEADER = 100_000_000  # bytes; the reference implementation's limit
MAX_DIMENSIONS = 64  # torch's limit
MAX_COUNT = 2**63 - 1
DAMAGED = "the file is truncated or damaged: download or save it again"


class SafetensorsFile:
    """A `TensorFile` over one safetensors file; only the header is read when opened.

    Raises `CheckpointError` where the header is longer than the file, is not JSON, names a dtype that is not supported,
    or where the tensors' offsets overlap, leave gaps or do not end with the file.
    """

    ties: tuple[tuple[str, ...], ...] = ()  # the format stores no shared tensors

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = FileStamp.take(path)
        header, data_start = self._header()
        self.infos: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}
        spans: list[tuple[int, int, str]] = []
        for name, entry in header.items():
            if name == "__metadata__":
                self._check_metadata(entry)
                continue
            check_name(path, name)
            info, (begin, end) = self._entry(name, entry)
            self.infos[name] = info
            self._starts[name] = data_start + begin
            spans.append((begin, end, name))
        self._check_spans(sorted(spans), self._stamp.size - data_start)

    def read(self, name: str) -> Tensor:
        info = self.infos[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        self.fill(name, 0, tensor)
        return tensor

    def read_piece(self, name: str, start: int, stop: int) -> Tensor:
        tensor = torch.empty(stop - start, dtype=self.infos[name].dtype)
        self.fill(name, start, tensor)
        return tensor

    def fill(self, name: str, start: int, out: Tensor) -> None:
        memory, position = as_bytes(out), 0
        try:
            with open(self.path, "rb", buffering=0) as file:
                self._stamp.check(self.path, file.fileno())
                file.seek(self._starts[name] + start * out.itemsize)
                while position < len(memory):  # one call reads 2 GiB at most
                    count = file.readinto(memory[position:])
                    if not count:
                        raise CheckpointError(f"{self.path}: ends inside tensor {name!r}", DAMAGED)
                    position += count
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} cannot be read ({reason(error)})", "restore the file and start again"
            ) from None

    def _header(self) -> tuple[dict[str, Any], int]:
        """The header and the offset at which the tensors' bytes begin."""
        try:
            with open(self.path, "rb") as file:
                prefix = file.read(8)
                if prefix == b"version ":
                    raise CheckpointError(
                        f"{self.path}: a git-lfs pointer, not the weights", "run `git lfs pull` there"
                    )
                length = int.from_bytes(prefix, "little")
                if self._stamp.size < 8 or length > self._stamp.size - 8 or length > MAX_HEADER:
                    raise CheckpointError(
                        f"{self.path}: claims a header of {length} bytes in a file of {self._stamp.size}", DAMAGED
                    )
                raw = file.read(length)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({reason(error)})", "check its rights") from None
        if len(raw) != length or not raw.startswith(b"{"):
            raise CheckpointError(f"{self.path}: the header is not JSON", "is it really a safetensors file?")
        try:
            return parse_json(raw), 8 + length
        except ValueError as error:
            raise CheckpointError(f"{self.path}: the header is not JSON ({reason(error)})", DAMAGED) from None

    def _check_metadata(self, metadata: Any) -> None:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(f"{self.path}: __metadata__ is not a map of text", DAMAGED)

    def _entry(self, name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{self.path}: tensor {name!r} lacks dtype, shape or data_offsets", DAMAGED)
        dtype = SUPPORTED.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if dtype is None:
            raise CheckpointError(f"{self.path}: tensor {name!r} has unsupported dtype {entry['dtype']!r}", DTYPE_HINT)
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not (_counts(shape) and _counts(offsets)) or len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
            raise CheckpointError(f"{self.path}: tensor {name!r} has an invalid shape or offsets", DAMAGED)
        extent = 1  # zero-sized dimensions left out: their strides must fit torch's integers too
        for size in shape:
            extent *= max(size, 1)
            if extent > MAX_COUNT // 8:
                raise CheckpointError(f"{self.path}: tensor {name!r} has an impossible shape", DAMAGED)
        info = TensorInfo(tuple(shape), dtype)
        begin, end = offsets
        if end - begin != info.nbytes:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} needs {info.nbytes} bytes, its offsets give {end - begin}", DAMAGED
            )
        return info, (begin, end)

    def _check_spans(self, spans: list[tuple[int, int, str]], size: int) -> None:
        position = 0
        for begin, end, name in spans:
            if end > size:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} ends at byte {end} of {size} bytes of data", DAMAGED
                )
            if begin != position:
                fault = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
                raise CheckpointError(f"{self.path}: tensor {name!r} {fault}", DAMAGED)
            position = end
        if position != size:
            raise CheckpointError(f"{self.path}: {size - position} bytes follow the last tensor", DAMAGED)


def _counts(value: Any) -> bool:
    """Whether ``value`` is a list of non-negative integers (JSON's true is no integer)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_COUNT for item in value)
