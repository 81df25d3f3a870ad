"""Which files make up a checkpoint: a single weight file, or a Hugging Face folder with or without an index.

An index is input from elsewhere: the shards it names must be plain file names. A file of a folder may be a symbolic
link only to a file inside that folder, or as in the Hugging Face cache, where ``snapshots/REVISION/x`` points into
``blobs/`` of the same repository; any other link could make a checkpoint hand out files of the machine. A file that the
user names directly may be any link.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError
from .formats import FileStamp, read_json, reason, some

SINGLE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
FORMS = "give a Hugging Face folder, a .safetensors file, or a .bin, .pt or .pth file saved by torch.save"
PART = re.compile(r"-0*(\d+)-of-0*(\d+)\.(?:safetensors|bin)$")
INCOMPLETE = re.compile(r"^\..+\.incomplete-\d+(-\d+)?$")
"""Names of the temporary folders that `write_checkpoint` renames into place when it is done."""

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece*",
    "sentencepiece*",
    "*.model",
    "*.tiktoken",
    "bpe.codes",
    "normalizer.json",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor*.json",
    "video_preprocessor_config.json",
    "feature_extractor*.json",
    "chat_template*",
)


@dataclass(frozen=True)
class Layout:
    """The weight files of a checkpoint, and for an indexed one which file is to hold which name."""

    files: tuple[Path, ...]
    weight_map: dict[str, Path] = field(default_factory=dict)
    index: Path | None = None


def find_layout(path: Path) -> Layout:
    """The weight files at ``path``; `CheckpointError` where there are none, too many, or an unfinished set."""
    if not os.path.isdir(path):  # False for impossible names too
        FileStamp.take(path)
        if path.suffix not in SINGLE_SUFFIXES:
            raise CheckpointError(f"{path}: not a known kind of weight file", FORMS)
        return Layout((path,))
    names = _names(path)
    _refuse_unfinished(path, names)
    for single, index_pattern in (
        ("model.safetensors", "*.safetensors.index.json"),
        ("pytorch_model.bin", "*.bin.index.json"),
    ):
        if single in names:
            return Layout((inside(path, single),))
        indices = sorted(name for name in names if Path(name).match(index_pattern))
        if len(indices) > 1:
            raise CheckpointError(f"{path}: several index files: {some(indices)}", "leave one, or give a single file")
        if indices:
            return _indexed(path, indices[0])
        if single.endswith(".safetensors") and (lone := _lone(path, names)):
            return Layout((lone,))
    raise CheckpointError(f"{path}: the folder holds no weights", FORMS)


def inside(folder: Path, name: str) -> Path:
    """The path of a folder's own file; `CheckpointError` where it is a link that leads out of the folder."""
    path = folder / name
    try:
        home, target = folder.resolve(strict=True), path.resolve(strict=True)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {name!r} is missing", "download the checkpoint again") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {name!r} cannot be read ({reason(error)})", "check the file") from None
    roots = [home, *(parent.parent / "blobs" for parent in (home, *home.parents) if parent.name == "snapshots")]
    if not any(target.is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"{folder}: {name!r} links to {str(target)!r}, outside its folder", "copy the file in, or give its own path"
        )
    return path


def side_files(folder: Path) -> list[Path]:
    """The configuration, tokenizer and processor files of a folder, sorted by name; none for a single file."""
    if not folder.is_dir():
        return []
    chosen = {
        name
        for name in _names(folder)
        if any(Path(name).match(pattern) for pattern in SIDE_FILES)
        and not name.endswith((*SINGLE_SUFFIXES, ".index.json"))
        and (folder / name).is_file()
    }
    return [inside(folder, name) for name in sorted(chosen)]


def _names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed ({reason(error)})", "check its rights") from None


def _refuse_unfinished(folder: Path, names: set[str]) -> None:
    if INCOMPLETE.match(folder.resolve().name):
        raise CheckpointError(f"{folder}: the rest of a write that was cut off", "delete it and merge again")
    if markers := sorted(name for name in names if name.endswith(".incomplete")):
        raise CheckpointError(
            f"{folder}: an unfinished download or write ({some(markers)})", "finish it, or start again"
        )


def _lone(folder: Path, names: set[str]) -> Path | None:
    """The folder's only safetensors file, if it has any."""
    found = sorted(name for name in names if name.endswith(".safetensors"))
    if not found:
        return None
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{folder}: a LoRA adapter, not a model", "give it as an expert, with the base it was trained on"
        )
    part = PART.search(found[0])
    if part and int(part[2]) > 1:
        raise CheckpointError(f"{folder}: shards without their *.safetensors.index.json", "download the index too")
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: {len(found)} safetensors files and no index: {some(found)}", "give the path of one of them"
        )
    return inside(folder, found[0])


def _indexed(folder: Path, name: str) -> Layout:
    index = inside(folder, name)
    weight_map = read_json(index, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map in the index", "download or save it again")
    return Layout(*_shards(folder, index, weight_map), index)


def _shards(folder: Path, index: Path, weight_map: dict[str, object]) -> tuple[tuple[Path, ...], dict[str, Path]]:
    paths: dict[str, Path] = {}
    for shard in dict.fromkeys(_shard_names(index, weight_map)):
        suffix = index.name.removesuffix(".index.json").rpartition(".")[2]
        if not shard.endswith(f".{suffix}"):
            raise CheckpointError(f"{index}: shard {shard!r} is no .{suffix} file", "download or save it again")
        paths[shard] = inside(folder, shard)
    files = tuple(paths[shard] for shard in sorted(paths))
    return files, {name: paths[str(shard)] for name, shard in weight_map.items()}


def _shard_names(index: Path, weight_map: dict[str, object]) -> Iterator[str]:
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard:
            raise CheckpointError(f"{index}: no shard is named for {name!r}", "download or save it again")
        if any(mark in shard for mark in "/\\\0") or shard in (".", ".."):
            raise CheckpointError(
                f"{index}: shard {shard!r} is not a plain file name inside the folder", "do not use this checkpoint"
            )
        yield shard
