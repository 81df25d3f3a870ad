"""Checkpoints as lazy mappings: everything is checked when opened, a tensor is read when asked for."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from ..errors import CheckpointError
from .formats import TensorFile, TensorInfo, fingerprint_tensors, read_json, some
from .layout import Layout, find_layout, inside, side_files
from .safetensors_file import SafetensorsFile
from .tied import declared_groups, union
from .torch_file import TorchFile


class Checkpoint(Mapping[str, Tensor]):
    """Tensors by name on disk; made by `open_checkpoint`.

    Names come sorted. ``checkpoint[name]`` reads that tensor alone, afresh each time, and keeps nothing: the caller
    owns the result. ``len``, ``in``, iteration, `info` and `nbytes` read no tensor.
    """

    notices: tuple[str, ...] = ()
    """What somebody who merges this should know."""
    replaced_files: Mapping[str, bytes] = MappingProxyType({})
    """Contents of side files that a copy gets in place of the folder's."""

    def __init__(self, path: Path, holders: Mapping[str, TensorFile], skipped: Sequence[str] = ()) -> None:
        self.path = path
        self.names: tuple[str, ...] = tuple(sorted(holders))
        self.skipped: tuple[str, ...] = tuple(sorted(skipped))
        """Names that the ``skip`` patterns left out."""
        self._holders = dict(holders)

    def __getitem__(self, name: str) -> Tensor:
        return self.holder(name).read(name)

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` of the flattened tensor, (stop - start,), reading no others."""
        return self.holder(name).read_piece(name, start, stop)

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """`piece` from ``start`` on, into the memory of ``out`` (n,)."""
        self.holder(name).fill(name, start, out)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._holders

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors, {self.nbytes} bytes)"

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor, from the header."""
        return self.holder(name).infos[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(self.info(name).nbytes for name in self.names)

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes, dtypes and bytes; reads every tensor once, then remembers.

        Equal for equal tensors, however they are stored.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint_tensors(self)

    def stamp(self) -> str:
        """Path, size and modification time of every weight file, as text."""
        files = sorted({holder.path.resolve() for holder in self._holders.values()})
        found = [(path, path.stat()) for path in files]
        return "\n".join(f"{path} {status.st_size} {status.st_mtime_ns}" for path, status in found)

    def side_files(self) -> list[Path]:
        """The configuration, tokenizer and processor files that belong into every copy of this model."""
        return side_files(self.path)

    @cached_property
    def config(self) -> dict[str, object]:
        """The folder's config.json; empty where there is none."""
        if not (self.path / "config.json").exists():
            return {}
        return dict(read_json(inside(self.path, "config.json"), "model configuration"))

    @cached_property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Groups of names that are one parameter: by shared storage, or declared by config.json and equal."""
        stored = (group for file in dict.fromkeys(self._holders.values()) for group in file.ties)
        present = [tuple(name for name in group if name in self._holders) for group in stored]
        infos = {name: self.info(name) for name in self.names}
        return union([*present, *declared_groups(self.config, infos, self.__getitem__)])

    def holder(self, name: str) -> TensorFile:
        """The file that holds a tensor."""
        try:
            return self._holders[name]
        except KeyError:
            raise KeyError(f"{self.path} holds no tensor {name!r}") from None


def open_checkpoint(path: str | Path, skip: Sequence[str] = ()) -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Args:
        path: a Hugging Face folder (in this order of preference: ``model.safetensors``, an index with its shards,
            exactly one ``.safetensors`` of any name, ``pytorch_model.bin``, its index with shards), or a single
            ``.safetensors``, ``.bin``, ``.pt`` or ``.pth`` file. PyTorch files are loaded with ``weights_only=True``
            and may hold their tensors under "state_dict" or "model".
        skip: glob patterns of names to leave out, such as ``classifier.*``.

    Raises `CheckpointError` for anything missing, damaged, unfinished, contradictory or unsafe, before any work.
    """
    if isinstance(skip, str):
        raise CheckpointError(f"skip is the text {skip!r}, not a list of patterns", f"write [{skip!r}]")
    path = Path(path).expanduser()
    layout = find_layout(path)
    holders: dict[str, TensorFile] = {}
    for file in (open_file(file) for file in layout.files):
        for name in file.infos:
            if name in holders:
                raise CheckpointError(
                    f"{path}: {name!r} is in {holders[name].path.name!r} and in {file.path.name!r}",
                    "remove the shards that do not belong to the index",
                )
            holders[name] = file
    skipped = {name for name in holders if any(fnmatch.fnmatchcase(name, pattern) for pattern in skip)}
    _check_index(layout, holders, skipped)
    kept = {name: file for name, file in holders.items() if name not in skipped}
    if not kept:
        raise CheckpointError(f"{path}: no tensors{' but skipped ones' if skipped else ''}", "check the path and skip")
    checkpoint = Checkpoint(path, kept, sorted(skipped))
    checkpoint.config  # noqa: B018 - read now, so that a damaged config.json is refused before any work
    return checkpoint


def open_file(path: Path) -> TensorFile:
    """One weight file, by its ending."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def _check_index(layout: Layout, holders: Mapping[str, TensorFile], skipped: set[str]) -> None:
    """Index and shards must say the same: nothing listed is missing, nothing present is unlisted."""
    if layout.index is None:
        return
    astray = [n for n, file in sorted(layout.weight_map.items()) if n not in holders or holders[n].path != file]
    if astray:
        name = astray[0]
        raise CheckpointError(
            f"{layout.index}: {len(astray)} tensors are not in their shard: {name!r} not in "
            f"{layout.weight_map[name].name!r}",
            "download or save the checkpoint again",
        )
    unlisted = sorted(name for name in holders if name not in layout.weight_map and name not in skipped)
    if unlisted:
        raise CheckpointError(
            f"{layout.index}: the shards hold {len(unlisted)} tensors it does not list: {some(map(repr, unlisted))}",
            "save the checkpoint again, or skip these names",
        )
