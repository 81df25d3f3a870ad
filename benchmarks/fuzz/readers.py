"""Readers: a folder of valid files, one mutation of it, and how it is opened."""

from __future__ import annotations

import io
import json
import math
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from bmm.anchors import emr_compress
from bmm.checkpoint import describe_adapter, open_checkpoint
from bmm.checkpoint.adapters import open_adapter
from bmm.checkpoint.masked import open_masked
from bmm.checkpoint.tokens import extended_files, read_tokens
from bmm.evaluation import check_tasks
from bmm.functions import call_function
from bmm.mergekit.config import MergekitConfig
from bmm.mergekit.plan import Plan
from bmm.recipe import Recipe
from bmm.records import Hyperparameters, Trial
from bmm.search.database import StudyDatabase

from .documents import (
    ADAPTER,
    BASE,
    CONFIG,
    FACTORS,
    HEADER,
    MERGEKIT,
    NAMES,
    RECIPE,
    TASKS,
    TOKENIZERS,
    UNIGRAM,
    entry,
)
from .mutator import HOSTILE, Mutator


@dataclass(frozen=True)
class Reader:
    """``prepare`` writes what never changes, ``mutate`` one mutation, ``read`` opens it as bmm does. ``share`` of the
    mutations are run (building models is slow); ``follows``: the file may name others elsewhere, as a recipe does."""

    prepare: Callable[[Path], None]
    mutate: Callable[[Path, Mutator], None]
    read: Callable[[Path], object]
    share: float = 1.0
    follows: bool = False


SECRET = "secret"


def _secrets(folder: Path) -> None:
    """What no reader may find: files beside the folder, and links to them inside it."""
    outside = folder.parent / SECRET
    outside.mkdir(exist_ok=True)
    save_file({SECRET: torch.ones(2)}, outside / "secret.safetensors")
    (folder / "link.safetensors").symlink_to(outside / "secret.safetensors")
    (folder / "linked").symlink_to(outside)


def _read_all(path: Path) -> None:
    """Open a checkpoint and read what it holds; none of it may be larger than the files, nor the secret."""
    checkpoint = open_checkpoint(path)
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.is_file()]
    size = sum(f.stat().st_size for f in files)
    assert SECRET not in checkpoint, "read what lies outside the folder"
    for name in checkpoint:
        assert checkpoint.info(name).nbytes <= size, f"{name} is larger than its file"
        assert checkpoint[name].nbytes == checkpoint.info(name).nbytes
    assert checkpoint.tied is not None
    assert checkpoint.side_files() is not None


def _safetensors(folder: Path, mutator: Mutator) -> None:
    header = mutator.document(HEADER)
    length = len(header) if mutator.random() < 0.9 else mutator.choice([0, 7, len(header) + 1, 10**15, 2**64 - 1])
    whole = struct.pack("<Q", length) + header + bytes(range(40))
    (folder / "model.safetensors").write_bytes(mutator.raw(whole) if mutator.random() < 0.2 else whole)


def _shards(folder: Path) -> None:
    _secrets(folder)
    for number, name in enumerate(("a.weight", "b.weight"), 1):
        save_file({name: torch.ones(3)}, folder / f"model-0000{number}-of-00002.safetensors")


def _index(folder: Path, mutator: Mutator) -> None:
    names = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    document = {"metadata": {"total_size": 24}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_bytes(mutator.document(document))


def _one(folder: Path) -> None:
    _secrets(folder)
    tied = torch.ones(3, 2)
    save_file({"embed_tokens.weight": tied, "lm_head.weight": tied.clone()}, folder / "model.safetensors")


def _archive(folder: Path, mutator: Mutator) -> None:
    buffer = io.BytesIO()
    weight = torch.arange(6.0).reshape(2, 3)
    torch.save({"state_dict": {"a": weight, "tied": weight, "b": torch.arange(3)}}, buffer)
    content = buffer.getvalue()
    if mutator.random() < 0.6:  # with sums that are right, so that what is inside is looked at
        out = io.BytesIO()
        with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(out, "w") as new:
            for item in old.namelist():
                changed = mutator.random() < (0.8 if item.endswith("data.pkl") else 0.1)
                new.writestr(item, mutator.raw(old.read(item)) if changed else old.read(item))
        content = out.getvalue()
    else:
        content = mutator.raw(content)
    (folder / "pytorch_model.bin").write_bytes(content)


def _task_file(folder: Path, mutator: Mutator) -> None:
    text = TASKS
    for _ in range(mutator.randint(0, 3)):
        words = text.replace("(", " ( ").split(" ")
        words[mutator.randrange(len(words))] = mutator.choice([*map(repr, HOSTILE[:24]), "return", "(", "torch", "x"])
        text = " ".join(words)
    (folder / "t.py").write_bytes(
        mutator.raw(text.encode()) if mutator.random() < 0.3 else text.encode("utf-8", "replace")
    )


def adapted(folder: Path) -> None:
    _secrets(folder)
    (folder / "base").mkdir()
    save_file({name: torch.ones(shape) for name, shape in BASE.items()}, folder / "base" / "model.safetensors")


def adapter(folder: Path, mutator: Mutator) -> None:
    """The configuration or the names and shapes of the tensors, sometimes both."""
    which = mutator.randrange(5)
    clean = json.dumps(ADAPTER).encode()
    (folder / "adapter_config.json").write_bytes(clean if which == 0 else mutator.document(ADAPTER))
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in FACTORS.items():
        size = 4 * math.prod(shape)
        header[f"base_model.model.{name}"] = entry(list(shape), start, start + size)
        start += size
    text = mutator.document(header) if which < 2 else json.dumps(header).encode()
    whole = struct.pack("<Q", len(text)) + text + struct.pack("<f", 0.5) * (start // 4)
    (folder / "adapter_model.safetensors").write_bytes(whole)


def _read_adapter(folder: Path) -> None:
    describe_adapter(folder)
    found = open_adapter(folder, open_checkpoint(folder / "base"))
    for name in found:
        assert found[name].shape == BASE[name], f"{name} has another shape than the base's"
    assert found.fingerprint()
    assert found.side_files() is not None


def _tokenizer(folder: Path, mutator: Mutator) -> None:
    """One of the files of a tokenizer; without tokenizer.json the vocabulary's own are read."""
    for name in (*TOKENIZERS, "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    names = [n for n in TOKENIZERS if n != "tokenizer.json"] if mutator.random() < 0.4 else list(TOKENIZERS)
    chosen = mutator.choice(names)
    for name in names:
        document = UNIGRAM if name == "tokenizer.json" and mutator.random() < 0.3 else TOKENIZERS[name]
        content = mutator.document(document) if name == chosen else json.dumps(document).encode()
        (folder / name).write_bytes(content)
    if "tokenizer.json" not in names and mutator.random() < 0.3:
        (folder / "vocab.json").unlink()
        (folder / "vocab.txt").write_bytes(mutator.raw(b"[PAD]\n[UNK]\na\nb\n##c\n"))


def _read_tokenizer(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    tokens = read_tokens(checkpoint)
    assert tokens is None or all(0 <= row < 2**31 for row in tokens.rows.values())
    extended_files(checkpoint, {"<other>": (9, {"special": True})})


def _masked(folder: Path) -> None:
    models = folder.parent / "models"
    models.mkdir()
    for name, value in (("base", 0.0), ("a", 1.0), ("b", -2.0)):
        save_file({"w": torch.full((3, 3), value)}, models / f"{name}.safetensors")
    base, *experts = (open_checkpoint(models / f"{name}.safetensors") for name in ("base", "a", "b"))
    emr_compress(base, experts, ["a", "b"]).save(folder / "made")
    for file in (folder / "made").iterdir():
        file.rename(folder / file.name)
    (folder / "made").rmdir()


def _masks(folder: Path, mutator: Mutator) -> None:
    valid = folder.parent / "masks.json"
    if not valid.exists():
        shutil.copy(folder / "masks.json", valid)
    (folder / "masks.json").write_bytes(mutator.document(json.loads(valid.read_text())))


def _study(folder: Path) -> None:
    point = Hyperparameters({"g": 1.0}, {"g": 0.5})
    with StudyDatabase.create(
        folder.parent / "study.sqlite", {"recipe": {"seed": 1}, "search": {"goal": "mean"}}
    ) as study:
        for number, kind in enumerate(("anchor", "default")):
            study.begin(Trial(number, kind, "pending", point, {}, None, 0.1, 0.0, ""))
            study.finish(Trial(number, kind, "completed", point, {"a": 0.5}, 0.5, 0.1, 0.2, ""))


def _database(folder: Path, mutator: Mutator) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "study.sqlite").write_bytes(mutator.raw((folder.parent / "study.sqlite").read_bytes()))


def _read_study(folder: Path) -> None:
    with StudyDatabase.open(folder / "study.sqlite", readonly=True) as study:
        study.meta(), study.trials(), study.notices()


def _weights(folder: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    ViTForImageClassification(ViTConfig(**CONFIG)).save_pretrained(folder)


def _build(folder: Path) -> None:
    from bmm.evaluation.skeleton import from_transformers

    from_transformers(folder)


def _writes(file: str, document: Any, plain: bool = False) -> Callable[[Path, Mutator], None]:
    """Writes mutations of a document as JSON, or every other one as YAML in block style."""

    def write(folder: Path, mutator: Mutator) -> None:
        if plain and mutator.random() < 0.5:
            text = yaml.safe_dump(document, sort_keys=False).encode()
            (folder / file).write_bytes(mutator.raw(text))
        else:
            (folder / file).write_bytes(mutator.document(document))

    return write


def _nothing(folder: Path) -> None: ...


READERS: dict[str, Reader] = {
    "safetensors header": Reader(_secrets, _safetensors, lambda f: _read_all(f / "model.safetensors")),
    "index of shards": Reader(_shards, _index, _read_all),
    "config.json": Reader(_one, _writes("config.json", CONFIG), _read_all),
    "config.json, model built": Reader(_weights, _writes("config.json", CONFIG), _build, share=0.05),
    "adapter": Reader(adapted, adapter, _read_adapter),
    "tokenizer files": Reader(_one, _tokenizer, _read_tokenizer),
    "torch archive": Reader(_secrets, _archive, lambda f: _read_all(f / "pytorch_model.bin")),
    "recipe": Reader(
        _nothing, _writes("r.yaml", RECIPE, True), lambda f: Recipe.load(f / "r.yaml").to_yaml(), follows=True
    ),
    "mergekit recipe": Reader(
        _nothing,
        _writes("c.yml", MERGEKIT, True),
        lambda f: Plan.of(MergekitConfig.load(f / "c.yml")).ways(NAMES, {}, 0),
    ),
    "task file": Reader(
        _nothing, _task_file, lambda f: check_tasks(call_function(f"{f / 't.py'}:tasks", "tasks"), ["a", "b"])
    ),
    "masks.json": Reader(_masked, _masks, open_masked, follows=True),
    "study": Reader(_study, _database, _read_study),
}
