"""A PEFT adapter folder as a checkpoint: the base's tensors as a LoRA leaves them, computed one at a time when read."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .adapter_changes import Builder
from .adapter_config import CONFIG, AdapterConfig, read_adapter_config
from .adapter_names import NameFinder, Parts, find_rule, output_modules, sort_parts, tied_names
from .formats import TensorFile, fingerprint_tensors, some
from .layout import inside, side_files
from .low_rank import AdaptedFile, Change
from .reader import Checkpoint, open_file

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


class AdapterCheckpoint(Checkpoint):
    """An adapter on its base, with the base's names, configuration and ties; made by `open_adapter`.

    What the adapter leaves alone is read from the base; what it changes is computed in float32 or better on each read.
    """

    def __init__(
        self, path: Path, base: Checkpoint, config: AdapterConfig, changed: AdaptedFile, adapter: TensorFile,
        skipped: Sequence[str], summary: dict[str, Any],
    ) -> None:  # fmt: skip
        kept = {name: base.holder(name) for name in base.names if name not in changed.infos}
        holders = kept | dict.fromkeys(changed.infos, changed)
        super().__init__(path, {n: holders[n] for n in holders if n not in set(skipped)}, skipped)
        self.base = base
        self.adapter = adapter
        self.summary = summary
        self.changes: Mapping[str, Change] = {n: c for n, c in changed.changes.items() if n not in set(skipped)}
        self.notices = _notices(config, base)

    @property
    def config(self) -> dict[str, object]:
        """The base's config.json."""
        return self.base.config

    @property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """The base's ties: an adapter that breaks one is refused when opened."""
        return self.base.tied

    @cached_property
    def _fingerprint(self) -> str:
        """Over the base, the adapter's own tensors and what is made of them: it costs no arithmetic, and does not
        depend on how a machine rounds it."""
        own = {name: self.adapter.read(name) for name in self.adapter.infos}
        changes = [[name, *self.changes[name].described()] for name in sorted(self.changes)]
        rest = json.dumps([list(self.names), changes])
        parts = ["bmm adapter 1", self.base.fingerprint(), fingerprint_tensors(own), rest]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def side_files(self) -> list[Path]:
        """The base's configuration files, and those of the adapter's folder in their place, such as a tokenizer."""
        files = {file.name: file for file in (*self.base.side_files(), *side_files(self.path))}
        return [files[name] for name in sorted(files)]


def is_adapter(path: Path) -> bool:
    """Whether a path is an adapter's folder, or the weight file in one.

    Raises `CheckpointError` for a folder that holds an adapter and a full model: which is meant must be said.
    """
    if not path.is_dir():
        return path.name in WEIGHTS and (path.parent / CONFIG).is_file()
    if not (path / CONFIG).is_file():
        return False
    full = sorted(
        entry.name
        for entry in path.iterdir()
        if entry.name in ("model.safetensors", "pytorch_model.bin") or entry.name.endswith(".index.json")
    )
    if full and any((path / name).exists() for name in WEIGHTS):
        raise CheckpointError(
            f"{path}: holds an adapter and a full model ({some(full)})",
            f"give the file that is meant: {path / WEIGHTS[0]} or {path / full[0]}",
        )
    return not full


def open_adapter(
    path: str | Path, base: Checkpoint, skip: Sequence[str] = (), stored_as: NameFinder | None = None
) -> AdapterCheckpoint:
    """Open a PEFT LoRA adapter on ``base`` without computing its tensors.

    Args:
        path: a folder with adapter_config.json and adapter_model.safetensors (or .bin), or that weight file.
        base: the checkpoint the adapter stands on.
        skip: glob patterns of (the base's) names to leave out.
        stored_as: asked where the adapter's names, those of a model in memory, are not the base's; see `find_rule`.

    Raises `CheckpointError` for an adapter of another kind than LoRA, an option that cannot be honoured, a tensor that
    has no place in the base, a target without tensors, or a broken tie of embedding and output layer.
    """
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    adapter, config = _open_parts(folder)
    parts = sort_parts(folder, adapter.infos)
    _require_equal(folder, adapter, parts)
    tied = tied_names(base)
    modules = list(parts.lora) or [n.rpartition(".")[0] for n in parts.full] or list(parts.tokens)
    virtual = output_modules(modules) if tied else []
    if not parts.lora:  # heads may be new; what is known decides
        known = [m for m in modules if any(n.endswith(f"{m}.weight") for n in base.names)]
        modules = known or modules[:0]
    rule = find_rule(folder, base, modules, virtual, stored_as)
    summary, saved = summarise(config, parts), list(parts.full)
    _leave_out(parts, rule.to_base, set(base.skipped))
    builder = Builder(folder, base, adapter, config, parts, rule, tied)
    changes = builder.changes()
    builder.require_all_targets(saved)
    names = {*base.names, *base.skipped, *changes}
    skipped = {n for n in names if any(fnmatch.fnmatchcase(n, p) for p in skip)} | set(base.skipped)
    changed = AdaptedFile(Path(adapter.path), {n: c for n, c in changes.items() if n not in skipped})
    return AdapterCheckpoint(folder, base, config, changed, adapter, sorted(skipped), summary)


def describe_adapter(path: str | Path) -> dict[str, Any]:
    """What an adapter is, without its base: ranks, scalings, options, modules; errors as in `open_adapter`."""
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    adapter, config = _open_parts(folder)
    parts = sort_parts(folder, adapter.infos)
    return summarise(config, parts) | {
        "tensors": len(adapter.infos),
        "parameters": sum(info.numel for info in adapter.infos.values()),
        "bytes": sum(info.nbytes for info in adapter.infos.values()),
    }


def summarise(config: AdapterConfig, parts: Parts) -> dict[str, Any]:
    """An adapter in a few words, for `bmm inspect`."""
    kind = ("rsLoRA" if config.rslora else "LoRA") + (" with DoRA" if config.dora else "")
    return {
        "kind": kind,
        "ranks": sorted({config.rank_of(module) for module in parts.lora}),
        "scalings": sorted({round(config.scaling_of(module), 6) for module in parts.lora}),
        "modules": len(parts.lora),
        "full_tensors": sorted(parts.full),
        "trained_tokens": sorted(parts.tokens),
        "bias": config.bias,
        "base": config.base,
    }


def _leave_out(parts: Parts, to_base: Callable[[str], str], names: set[str]) -> None:
    """Drop the parts that change tensors which the base was opened without."""
    parts.full = {n: s for n, s in parts.full.items() if to_base(n) not in names}
    parts.lora = {m: k for m, k in parts.lora.items() if f"{to_base(m)}.weight" not in names}
    parts.tokens = {m: s for m, s in parts.tokens.items() if f"{to_base(m)}.weight" not in names}


def _open_parts(folder: Path) -> tuple[TensorFile, AdapterConfig]:
    config = read_adapter_config(folder)
    present = [name for name in WEIGHTS if (folder / name).exists()]
    if not present:
        raise CheckpointError(f"{folder}: {CONFIG} without {' or '.join(WEIGHTS)}", "download the adapter's weights")
    return open_file(inside(folder, present[0])), config


def _require_equal(folder: Path, adapter: TensorFile, parts: Parts) -> None:
    for first, second in parts.repeated:
        if not torch.equal(adapter.read(first), adapter.read(second)):
            raise CheckpointError(f"{folder}: {first} and {second} differ", "save the adapter again with peft")


def _notices(config: AdapterConfig, base: Checkpoint) -> tuple[str, ...]:
    """A base of another place than the one given may be another base; what is no path of this machine says nothing."""
    try:
        said = Path(config.base).expanduser()
        local = bool(config.base) and (said.is_absolute() or said.is_dir())
        if not local or said.resolve() == base.path.resolve():
            return ()
    except (OSError, RuntimeError, ValueError):
        return ()
    return (f"{config.path.parent} was trained on {config.base}, and the base given is {base.path}",)
