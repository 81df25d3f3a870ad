"""The weight files of a checkpoint that is being written: each tensor goes to its place as it comes.

Where names, shapes and dtypes are known beforehand, every tensor's place in every shard is planned, and none is held.
Tensors outside the plan are collected until a shard is full.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import WriteError
from .atomic import FINISHED, sync, writing
from .behind import WINDOW, WriteBehind
from .formats import SUPPORTED, TensorInfo, as_bytes, reason

INDEX = "model.safetensors.index.json"
_NAMES = {dtype: name for name, dtype in SUPPORTED.items()}


@dataclass
class Shard:
    """One planned file: its header, each tensor's first byte, and the names that are still to be written."""

    header: bytes
    offsets: dict[str, int]
    size: int
    missing: set[str]
    descriptor: int | None = None
    behind: WriteBehind | None = None

    @classmethod
    def plan(cls, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None) -> Shard:
        """Lays tensors out as the safetensors library does: wide dtypes first, so that all are aligned, by name."""
        position, offsets = 0, dict[str, int]()
        entries: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
        for name in sorted(infos, key=lambda n: (-infos[n].dtype.itemsize, n)):
            info, end = infos[name], position + infos[name].nbytes
            entries[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [position, end]}
            offsets[name], position = position, end
        raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        header = len(raw).to_bytes(8, "little") + raw
        return cls(header, {n: len(header) + k for n, k in offsets.items()}, len(header) + position, set(infos))

    def write(self, content: memoryview, offset: int) -> None:
        """All of ``content`` to its place in the open file."""
        assert self.descriptor is not None
        assert self.behind is not None
        while content:
            count = os.pwrite(self.descriptor, content[:WINDOW], offset)
            self.behind.wrote(offset, count)
            content, offset = content[count:], offset + count


@dataclass
class Shards:
    """The files of ``temporary``, given their names when their number is known.

    ``plan`` gives shape and dtype of the tensors that have a place of their own. A planned file is
    ``shard-NNNNN.unfinished`` until it is whole; one that an earlier process finished by the same plan is kept, and the
    names in it are `done`.
    """

    temporary: Path
    target: Path
    max_bytes: int
    plan: Mapping[str, TensorInfo] = field(default_factory=dict)
    floating_dtypes: set[torch.dtype] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shard_of: dict[str, int] = {}
        self._written: set[str] = set()
        self._given: set[str] = set()
        self._first: dict[tuple[str, ...], tuple[str, bytes]] = {}  # tied group -> the first name given, its digest
        groups: list[dict[str, TensorInfo]] = []
        held = 0
        for name, info in self.plan.items():
            if not groups or held + info.nbytes > self.max_bytes:
                groups.append({})
                held = 0
            groups[-1][name] = info
            held += info.nbytes
            self._shard_of[name] = len(groups) - 1
        self._planned = [Shard.plan(group) for group in groups]
        self._shards = len(self._planned)
        for number, shard in enumerate(self._planned):
            if _is(self._path(number, FINISHED), shard):
                self._written |= shard.missing
                shard.missing.clear()
            self._path(number).unlink(missing_ok=True)
        self._require_space(sum(shard.size for shard in self._planned if shard.missing))
        kept = [self.plan[name] for name in self._written]
        self.floating_dtypes |= {info.dtype for info in kept if info.floating}
        self._total_bytes += sum(info.nbytes for info in kept)
        self.done = frozenset(self._written)

    def __contains__(self, name: str) -> bool:
        return name in self._written or name in self._pending

    def add(self, name: str, tensor: Tensor, group: tuple[str, ...], stored_names: tuple[str, ...]) -> None:
        """Store a tensor under all of ``stored_names``, or find it equal to the one already given for its ``group``."""
        if name in self._given:
            raise WriteError(f"tensor {name!r} was given twice", "give every tensor once")
        self._given.add(name)
        if group:
            digest = hashlib.sha256(as_bytes(tensor)).digest()
            first, expected = self._first.setdefault(group, (name, digest))
            if digest != expected:
                raise WriteError(f"{first!r} and {name!r} are tied but differ", "give one of them, or untie them")
            if first != name:
                return
        for number, stored in enumerate(stored_names):
            if stored in self.done:
                continue
            if tensor.is_floating_point():
                self.floating_dtypes.add(tensor.dtype)
            self._total_bytes += tensor.numel() * tensor.itemsize
            if stored in self.plan:
                self._put(stored, tensor)
            else:
                self._hold(stored, tensor.clone() if number else tensor)

    def finish(self) -> None:
        """Write what is pending and give the files their final names. All planned tensors must have been given."""
        self._flush()
        if not self._shards:
            raise WriteError(f"{self.target}: no tensors to write", "")
        final = [
            "model.safetensors" if self._shards == 1 else f"model-{number + 1:05d}-of-{self._shards:05d}.safetensors"
            for number in range(self._shards)
        ]
        with writing(self.target):
            for number, file_name in enumerate(final):
                whole = self._path(number, FINISHED)
                (whole if whole.exists() else self._path(number)).rename(self.temporary / file_name)
            if self._shards > 1:
                weight_map = {name: final[number] for name, number in sorted(self._shard_of.items())}
                index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
                (self.temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n")
                sync(self.temporary / INDEX)

    def close(self) -> None:
        """Close the files that are not complete, after a failure."""
        for shard in self._planned:
            if shard.descriptor is not None:
                os.close(shard.descriptor)
                shard.descriptor = None

    def _put(self, name: str, tensor: Tensor) -> None:
        """Write a planned tensor to its place; the last one of its shard completes the file."""
        if TensorInfo.of(tensor) != self.plan[name]:
            raise WriteError(
                f"tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, its place is for {self.plan[name]}",
                "give tied tensors one shape",
            )
        number = self._shard_of[name]
        shard = self._planned[number]
        with writing(self.target):
            if shard.descriptor is None:
                shard.descriptor = os.open(self._path(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                shard.behind = WriteBehind(shard.descriptor, shard.size)
                shard.write(memoryview(shard.header), 0)
            shard.write(as_bytes(tensor), shard.offsets[name])
            self._written.add(name)
            shard.missing.discard(name)
            if not shard.missing:
                os.fsync(shard.descriptor)
                os.close(shard.descriptor)
                shard.descriptor = None
                self._path(number).rename(self._path(number, FINISHED))

    def _hold(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.itemsize
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self._path(self._shards)
        with writing(self.target):
            path.touch()  # the library's own file would be the owner's alone
            mode = path.stat().st_mode
            try:
                save_file(self._pending, path, metadata={"format": "pt"})
            except SafetensorError as error:  # the library wraps what the operating system said
                raise WriteError(
                    f"{self.target}: cannot be written ({reason(error)})", "check the space left and its rights"
                ) from error
            path.chmod(mode & 0o777)
            sync(path)
        self._shard_of |= dict.fromkeys(self._pending, self._shards)
        self._written |= set(self._pending)
        self._shards += 1
        self._pending, self._pending_bytes = {}, 0

    def _require_space(self, needed: int) -> None:
        """Refuse before any work what the disk has no room for."""
        with writing(self.target):
            free = shutil.disk_usage(self.temporary).free
        if needed > free:
            raise WriteError(
                f"{self.target}: cannot be written (No space left: needs {_sized(needed)}, {_sized(free)} are free)",
                "free some disk space or write elsewhere",
            )

    def _path(self, number: int, suffix: str = ".unfinished") -> Path:
        return self.temporary / f"shard-{number:05d}{suffix}"


def _sized(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e3:.1f} kB"


def _is(path: Path, shard: Shard) -> bool:
    """Whether a file has this shard's header and size."""
    try:
        with open(path, "rb") as file:
            return file.read(len(shard.header)) == shard.header and path.stat().st_size == shard.size
    except OSError:
        return False
