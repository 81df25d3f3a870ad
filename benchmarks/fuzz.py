"""Hostile files against every reader: python benchmarks/fuzz.py [--mutations 1100] [--seed 0] [--reader NAME]

Valid files are mutated by a seeded generator and opened as a user's would be. A reader may open what it is given or
refuse it with a `BmmError`; anything else is a crash. Each reader runs in a process of its own that may not take more
than `ROOM` beyond what it had, and every file that Python opens outside the reader's folder is counted. The table says
how many mutations were opened, refused and crashed, the most memory Python took for one, and the slowest.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import math
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
from bmm.errors import BmmError
from bmm.evaluation import check_tasks
from bmm.functions import call_function
from bmm.mergekit.config import MergekitConfig
from bmm.mergekit.plan import Plan
from bmm.recipe import Recipe
from bmm.records import Hyperparameters, Trial
from bmm.search.database import StudyDatabase

ROOM = 512 << 20
"""Bytes of address space a reader's process may take for the mutations."""

SECRET = "secret"
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 2**31, 2**63 - 1, 2**63, 10**15, 10**30, 0.5, -0.0, math.nan, math.inf, 1e300,
    "", " ", "\0", "\ud800", "a" * 3000, "F32", "F8_E4M3", "C64", "I64", "BOOL", [], {}, [0], [0, 8], [8, 0], [-1],
    [10**15, 10**15], [2**62, 4, 0], [[1]], {"a": 1}, {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "../secret/secret.safetensors",
    "/etc/passwd", "link.safetensors", "linked/secret.safetensors", ".", "..",
    "/proc/self/mem", "model.safetensors", "model-00001-of-00002.safetensors", "name/../x.safetensors", "*", "[", "1e9",
    "0x1f", "2001-99-99", "&a", "~", "!!python/object:os.system", "path:/etc", "a.py:b", "../x.py:y",
)  # fmt: skip
TEXT = (b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 50_000, b'{"a":' * 20_000, b"\xff\xfe", b"\xef\xbb\xbf",
        b"\0", b"]", b"}", b",", b'"', b"\\u0000", b"\\ud800", b"- ", b": ", b"\n", b"\t",
        b"&a *a", b"<<: ")  # fmt: skip


class Mutator(random.Random):
    """Draws mutations; the same seed gives the same ones."""

    def document(self, document: Any) -> bytes:
        """A JSON document with up to three values, keys or elements changed, then perhaps its text."""
        changed = copy.deepcopy(document)
        for _ in range(self.randint(0, 3)):
            changed = self._edited(changed)
        text = json.dumps(changed).encode()
        if isinstance(changed, dict) and changed and self.random() < 0.1:
            key = self.choice(sorted(changed, key=str))
            again = json.dumps({key: self.choice([changed[key], self.choice(HOSTILE)])}).encode()
            text = text[:-1] + b", " + again[1:]
        return self.raw(text) if self.random() < 0.3 else text

    def raw(self, content: bytes) -> bytes:
        """Bytes with up to four of them flipped, cut off, repeated, or with hostile text put in."""
        data = bytearray(content)
        for _ in range(self.randint(1, 4)):
            at = self.randrange(len(data) + 1)
            kind = self.randrange(6)
            if kind < 3 and at < len(data):
                data[at] = self.randrange(256)
            elif kind == 3:
                data[at:at] = self.choice(TEXT)
            elif kind == 4:
                del data[at : at + self.choice([1, 4, 100, len(data)])]
            else:
                data[at:at] = data[at : at + self.randint(1, 64)]
        return bytes(data)

    def _edited(self, value: Any) -> Any:
        """``value`` with one place in it changed."""
        if isinstance(value, dict) and value and self.random() < 0.9:
            key = self.choice(sorted(value, key=str))
            kind = self.randrange(8)
            if kind == 0:
                del value[key]
            elif kind == 1:
                value[str(self.choice(HOSTILE))] = value.pop(key)
            elif kind == 2:
                value[str(self.choice(HOSTILE))] = self.choice(HOSTILE)
            else:
                value[key] = self._edited(value[key])
            return value
        if isinstance(value, list) and value and self.random() < 0.7:
            at = self.randrange(len(value))
            kind = self.randrange(4)
            if kind == 0:
                del value[at]
            elif kind == 1:
                value.append(copy.deepcopy(value[at]))
            else:
                value[at] = self._edited(value[at])
            return value
        if self.random() < 0.05:
            deep: Any = value
            for _ in range(self.choice([20, 200])):
                deep = [deep] if self.random() < 0.5 else {"a": deep}
            return deep
        if isinstance(value, int) and not isinstance(value, bool) and self.random() < 0.4:
            return value + self.choice([-1, 1, 8, -8, 2**31, 10**15])
        return copy.deepcopy(self.choice(HOSTILE))


# readers: a folder of valid files, one mutation of it, and how it is opened


@dataclass(frozen=True)
class Reader:
    """``prepare`` writes what never changes, ``mutate`` one mutation, ``read`` opens it as bmm does. ``share`` of the
    mutations are run (building models is slow); ``follows``: the file may name others elsewhere, as a recipe does."""

    prepare: Callable[[Path], None]
    mutate: Callable[[Path, Mutator], None]
    read: Callable[[Path], object]
    share: float = 1.0
    follows: bool = False


def _entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": _entry([2, 3], 0, 24),
    "a.bias": _entry([4], 24, 32, "F16"),
    "steps": _entry([], 32, 40, "I64"),
}
CONFIG = {"architectures": ["ViTForImageClassification"], "model_type": "vit", "hidden_size": 16, "image_size": 16,
          "patch_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 3,
          "id2label": {"0": "a", "1": "b", "2": "c"}, "torch_dtype": "float32", "tie_word_embeddings": True,
          "hidden_act": "gelu", "text_config": {"tie_word_embeddings": True}}  # fmt: skip
RECIPE = {"base": "base", "experts": {"a": "a", "b": "b"}, "model": "m.py:f", "tasks": "t.py:f", "skip": ["head.*"],
          "anchor": "ties", "knobs": {"density": 0.3}, "grams": "hybrid", "gamma": 0.4, "calibration": 8,
          "weights": {"a": 0.5}, "groups": "depth", "group": {"x.*": "g"}, "log10_lam": [-3, 2], "rho": [0, 2],
          "search": ["gamma"], "goal": "worst", "floor": {"a": 0.9}, "objectives": ["a,b"], "budget": 9,
          "seed": 1, "dtype": "same", "shard_gib": 1.5, "early_stopping": 0.0}  # fmt: skip
MERGEKIT = {"merge_method": "ties", "base_model": "base", "dtype": "bfloat16", "parameters": {"normalize": True},
            "slices": [{"sources": [
                {"model": "a", "layer_range": [0, 2], "parameters": {"weight": [0, 0.5], "density": 0.5}},
                {"model": "b", "layer_range": [0, 2], "parameters": {"weight": [{"filter": "mlp", "value": [0, 1]},
                                                                               {"value": 1}]}},
            ]}], "tokenizer": {"source": "base"}}  # fmt: skip
BASE = {"layers.0.q.weight": (6, 4), "layers.0.q.bias": (6,), "layers.1.v.weight": (4, 4), "layers.1.v.bias": (4,),
        "embed_tokens.weight": (8, 4), "score.weight": (3, 4)}  # fmt: skip
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q", "v"],
           "rank_pattern": {"layers.1.v": 1}, "alpha_pattern": {"v": 3.5}, "modules_to_save": ["score"],
           "layers_to_transform": [0, 1], "layers_pattern": ["layers"], "use_rslora": True, "use_dora": False,
           "exclude_modules": "x.*", "trainable_token_indices": {"embed_tokens": [1, 5]}, "init_lora_weights": True,
           "fan_in_fan_out": False, "base_model_name_or_path": "/models/base", "task_type": "SEQ_CLS"}  # fmt: skip
FACTORS = {"layers.0.q.lora_A.weight": (2, 4), "layers.0.q.lora_B.weight": (6, 2), "layers.1.v.lora_A.weight": (1, 4),
           "layers.1.v.lora_B.weight": (4, 1), "score.weight": (3, 4),
           "embed_tokens.token_adapter.trainable_tokens_delta": (2, 4)}  # fmt: skip
TOKENIZERS: dict[str, Any] = {
    "tokenizer.json": {"version": "1.0", "added_tokens": [{"id": 3, "content": "<new>", "special": True}],
                       "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}},
    "vocab.json": {"a": 0, "b": 1, "ab": 2},
    "added_tokens.json": {"<new>": 3},
    "tokenizer_config.json": {"added_tokens_decoder": {"3": {"content": "<new>", "special": True}}},
}  # fmt: skip
UNIGRAM = {"added_tokens": None, "model": {"type": "Unigram", "vocab": [["<s>", 0], ["a", -1.5], ["b", -2]]}}
TASKS = """import torch
import bmm
def tasks():
    x = torch.zeros(4, 3)
    y = torch.zeros(4, dtype=torch.long)
    made = [bmm.Task(n, validation=(x, y), test={"x": [1, 2]} and (x, y), calibration=x) for n in ("a", "b")]
    return made
"""
NAMES = ["embed.weight", "layers.0.mlp.up.weight", "layers.1.mlp.up.weight", "norm.weight"]


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


def _adapted(folder: Path) -> None:
    _secrets(folder)
    (folder / "base").mkdir()
    save_file({name: torch.ones(shape) for name, shape in BASE.items()}, folder / "base" / "model.safetensors")


def _adapter(folder: Path, mutator: Mutator) -> None:
    """The configuration or the names and shapes of the tensors, sometimes both."""
    which = mutator.randrange(5)
    clean = json.dumps(ADAPTER).encode()
    (folder / "adapter_config.json").write_bytes(clean if which == 0 else mutator.document(ADAPTER))
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in FACTORS.items():
        size = 4 * math.prod(shape)
        header[f"base_model.model.{name}"] = _entry(list(shape), start, start + size)
        start += size
    text = mutator.document(header) if which < 2 else json.dumps(header).encode()
    whole = struct.pack("<Q", len(text)) + text + struct.pack("<f", 0.5) * (start // 4)
    (folder / "adapter_model.safetensors").write_bytes(whole)


def _read_adapter(folder: Path) -> None:
    describe_adapter(folder)
    adapted = open_adapter(folder, open_checkpoint(folder / "base"))
    for name in adapted:
        assert adapted[name].shape == BASE[name], f"{name} has another shape than the base's"
    assert adapted.fingerprint()
    assert adapted.side_files() is not None


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
    with StudyDatabase.create(folder.parent / "study.sqlite", {"recipe": {}, "search": {"goal": "mean"}}) as study:
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
    "adapter": Reader(_adapted, _adapter, _read_adapter),
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


@dataclass
class Outcome:
    """What became of the mutations of one reader. ``outside``: files that were opened and lie elsewhere."""

    reader: str
    opened: int = 0
    refused: int = 0
    crashed: Counter[str] = field(default_factory=Counter)
    outside: Counter[str] = field(default_factory=Counter)
    memory: int = 0
    seconds: float = 0.0


class _Watch:
    """Notes the files that Python opens outside a folder; code of Python and of packages aside."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: Counter[str] = Counter()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None or event != "open" or not isinstance(args[0], str | bytes):
            return
        path = os.path.realpath(os.fsdecode(args[0]))
        code = path.endswith((".py", ".pyc", ".so")) or any(path.startswith(p) for p in (sys.prefix, sys.base_prefix))
        if not code and not path.startswith((f"{self.folder}/", "/proc/self/", "/sys/", "/dev/")):
            self.seen[path] += 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and prints of what is loaded."""
    with warnings.catch_warnings(), open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            with contextlib.redirect_stderr(sink):
                yield
        finally:
            logging.disable(logging.NOTSET)


def attack(name: str, mutations: int, seed: int, folder: Path, watch: _Watch | None = None) -> Outcome:
    """Run one reader over so many mutations, drawn from ``seed``, in ``folder``, which is new."""
    reader, outcome = READERS[name], Outcome(name)
    place = (folder / "place").resolve()
    place.mkdir(parents=True)
    reader.prepare(place)
    with quiet():
        for number in range(max(1, round(mutations * reader.share))):
            reader.mutate(place, Mutator(f"{name} {seed} {number}"))
            if watch:
                watch.folder = None if reader.follows else place
            tracemalloc.start()
            begun = time.perf_counter()
            try:
                reader.read(place)
                outcome.opened += 1
            except BmmError as error:
                outcome.refused += 1
                if "\n" in error.message:
                    outcome.crashed[f"mutation {number}: an error of several lines: {error.message[:200]!r}"] += 1
            except BaseException as error:
                outcome.crashed[f"mutation {number}: {type(error).__name__}: {str(error)[:200]}"] += 1
                if isinstance(error, KeyboardInterrupt):
                    raise
            outcome.seconds = max(outcome.seconds, time.perf_counter() - begun)
            outcome.memory = max(outcome.memory, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            if watch:
                watch.folder = None
    if watch:
        outcome.outside += watch.seen
    return outcome


def confine(room: int = ROOM) -> None:
    """Let this process take no more than ``room`` bytes of address space beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room,) * 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=1_100, help="of each reader: 10,000 in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, action="append", help="only this one; repeatable")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # task files change faster than the clock of the cache
    if args.child:
        (name,) = args.reader
        watch = _Watch()
        with tempfile.TemporaryDirectory() as folder:
            if name.endswith("built"):
                import transformers.models.vit.modeling_vit  # noqa: F401 - loaded before memory is counted
            attack(name, 3, -1, Path(folder) / "warm")
            confine()
            print(json.dumps(vars(attack(name, args.mutations, args.seed, Path(folder) / "run", watch))))
        return
    rows, failed = [], False
    for name in args.reader or READERS:
        command = [sys.executable, __file__, "--child", "--reader", name, "--mutations", str(args.mutations)]
        done = subprocess.run([*command, "--seed", str(args.seed)], capture_output=True, text=True)
        if done.returncode:
            rows.append([name, "", "", "", f"the process ended with {done.returncode}", "", "", ""])
            print(done.stderr[-2000:], file=sys.stderr)
            failed = True
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        crashes = sum(found["crashed"].values())
        failed = failed or bool(crashes or found["outside"])
        for what in ("crashed", "outside"):
            for text in list(found[what])[:20]:
                print(f"{name}: {what}: {text}", file=sys.stderr)
        total = found["opened"] + found["refused"] + crashes
        cells = [total, found["opened"], found["refused"], crashes, sum(found["outside"].values())]
        rows.append([name, *map(str, cells), f"{found['memory'] / 2**20:.1f}", f"{1000 * found['seconds']:.0f}"])
    from bmm.report import markdown

    header = ["reader", "mutations", "opened", "refused", "crashed", "read outside", "most MiB", "slowest ms"]
    print(markdown(header, rows))
    sys.exit(failed)


if __name__ == "__main__":
    main()
