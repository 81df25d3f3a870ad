"""Merge the published eight-task CLIP experts and tune the merge: python examples/clip/clip.py --help

Downloads base, experts and data from the Hugging Face hub (what lies in --models and --data already is used), writes a
recipe and a task file, and runs `bmm tune` on them. Needs pip install 'bmm-tuner[hf,data]'; costs: README.md beside it.
Flags after -- go to `bmm tune`: python examples/clip/clip.py -- --device cuda --grams hybrid
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from bmm.checkpoint import Checkpoint, open_checkpoint, write_checkpoint

MODELS = {"B/32": "clip-vit-base-patch32", "L/14": "clip-vit-large-patch14"}
"""The base is openai/NAME on the hub, the experts are tanganke/NAME_TASK (arXiv 2406.03280)."""
SIDE = ("config.json", "preprocessor_config.json", "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Source:
    """A task: its expert's ending, its data set on the hub and the folder of the parquet files there."""

    expert: str
    data: str
    classes: int
    templates: tuple[str, ...]
    folder: str = "data"


def _spread(pattern: str, *words: Sequence[str]) -> tuple[str, ...]:
    """The pattern with every combination of the words in its places; the class's own place stays."""
    return tuple(pattern.format(*chosen, "{}") for chosen in product(*words))


_OVERHEAD = [f"{kind} {what}" for kind in ("satellite", "aerial") for what in ("imagery", "photo", "view")]
_NAMED = ("", "a ", "the ")
_NUMBER = ('a photo of the number: "{}".',)
_SIGN = ("zoomed in", "centered", "close up")
_CARS = (*_spread("a photo of {} {}.", ("a", "the", "my", *(f"my {w}" for w in ("dirty", "clean", "new", "old")))),
         "i love my {}!")  # fmt: skip
_TEXTURE = [f"{{}} {noun}" for noun in ("texture", "pattern", "thing", "object")]
TASKS = {
    "sun397": Source("sun397", "tanganke/sun397", 397, _spread("a photo of {} {}.", ("a", "the"))),
    "cars": Source("stanford-cars", "tanganke/stanford_cars", 196, _CARS),
    "resisc45": Source("resisc45", "tanganke/resisc45", 45, _spread("{} of {}{}.", _OVERHEAD, _NAMED)),
    "eurosat": Source("eurosat", "tanganke/eurosat", 10, _spread("a centered satellite photo of {}{}.", _NAMED)),
    "svhn": Source("svhn", "ufldl-stanford/svhn", 10, _NUMBER, "cropped_digits"),
    "gtsrb": Source("gtsrb", "tanganke/gtsrb", 43, _spread('a {} photo of a "{}" traffic sign.', _SIGN)),
    "mnist": Source("mnist", "ylecun/mnist", 10, _NUMBER, "mnist"),
    "dtd": Source("dtd", "tanganke/dtd", 47, _spread("a photo of {} {}.", ("a", "the"), _TEXTURE)),
}
"""Prompts of CLIP (arXiv 2103.00020), with which these experts were trained on frozen heads."""


def fetch_model(owner: str, name: str, models: Path) -> Path:
    """The folder of a model in ``models``, from the hub where it is not there."""
    folder = models / name
    if any((folder / file).is_file() for file in ("model.safetensors", "pytorch_model.bin")):
        return folder
    from huggingface_hub import list_repo_files, snapshot_download

    repo = f"{owner}/{name}"
    with _named(repo, folder):
        safe = "model.safetensors" in list_repo_files(repo)
        weights = "model.safetensors" if safe else "pytorch_model.bin"
        snapshot_download(repo, local_dir=folder, allow_patterns=[*SIDE, weights])
    return folder


def fetch_data(source: Source, folder: Path) -> dict[str, list[Path]]:
    """The parquet files of train and test split in ``folder``, from the hub where they are not all there."""
    found = {split: _shards(folder / source.folder, split) for split in SPLITS}
    if not all(found.values()):
        from huggingface_hub import snapshot_download

        patterns = [f"{source.folder}/{split}-*.parquet" for split in SPLITS]
        with _named(source.data, folder):
            snapshot_download(source.data, repo_type="dataset", local_dir=folder, allow_patterns=patterns)
        found = {split: _shards(folder / source.folder, split) for split in SPLITS}
    for split, files in found.items():
        if not files:
            sys.exit(f"{source.data}: no parquet files {source.folder}/{split}-*.parquet, in {folder} or on the hub")
    return found


class _named:
    """Turns what goes wrong with the hub into one line that says what to do."""

    def __init__(self, repo: str, folder: Path) -> None:
        self.repo, self.folder = repo, folder

    def __enter__(self) -> None:
        print(f"{self.repo} -> {self.folder}", flush=True)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            first = str(error).strip().splitlines()[:1]
            sys.exit(
                f"cannot download {self.repo}: {type(error).__name__}: {''.join(first)}\nput it into {self.folder}"
            )


def _shards(folder: Path, split: str) -> list[Path]:
    """The files of a split; none where some of them are missing, as after a download that was cut off."""
    files = sorted(folder.glob(f"{split}-*-of-*.parquet"))
    counts = {int(match[1]) for file in files if (match := re.search(r"-of-(\d+)", file.name))}
    return files if counts == {len(files)} else []


def class_names(source: Source, files: Sequence[Path], folder: Path) -> list[str]:
    """The classes in words, from the data set's own ClassLabel, or one a line from ``folder``/classes.txt."""
    if (folder / "classes.txt").is_file():
        names = (folder / "classes.txt").read_text().splitlines()
    else:
        from datasets import ClassLabel, Features
        from pyarrow.parquet import read_schema

        label = Features.from_arrow_schema(read_schema(files[0])).get("label")
        names = list(label.names) if isinstance(label, ClassLabel) else []
    if len(names) != source.classes:
        sys.exit(f"{files[0]} names {len(names)} classes for {source.classes}\nwrite them to {folder / 'classes.txt'}")
    return [name.replace("_", " ") for name in names]


def draw(files: Sequence[Path], parts: dict[Path, int], seed: int) -> None:
    """Write disjoint random rows to each path of ``parts``, as many as it says (0: all that are left)."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile, write_table

    opened = [ParquetFile(file) for file in files]
    groups = [(file, n) for file in opened for n in range(file.num_row_groups)]
    sizes = [file.metadata.row_group(n).num_rows for file, n in groups]
    order = list(range(sum(sizes)))
    random.Random(seed).shuffle(order)
    for path, count in parts.items():
        taken, order = (order[:count], order[count:]) if count else (order, [])
        if not taken:
            sys.exit(f"{files[0].parent}: {sum(sizes)} rows are too few for {', '.join(p.stem for p in parts)}")
        chosen, start, tables = set(taken), 0, []
        for (file, n), size in zip(groups, sizes, strict=True):
            rows = [row - start for row in range(start, start + size) if row in chosen]
            if rows:
                tables.append(file.read_row_group(n, columns=["image", "label"]).take(rows))
            start += size
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(pa.concat_tables(tables), path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)


def vision_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Name in `CLIPVisionModelWithProjection` -> stored name, of CLIP or of its vision tower, however it was saved."""
    found = {}
    for name in checkpoint:
        if name.endswith("position_ids") or name.startswith(("text_", "logit_")):
            continue
        own = name.startswith(("vision_model.", "visual_projection."))
        found[name if own else f"vision_model.{name}"] = name
    return found


def prepare(source: Path, base: Path, out: Path) -> Path:
    """The vision tower of ``source`` with the projection of ``base``, as a folder that `bmm` merges.

    The published experts are vision towers alone; zero-shot heads read the embedding behind the base's projection.
    """
    if (out / "config.json").is_file():
        return out
    from transformers import CLIPConfig

    config = CLIPConfig.from_pretrained(str(base))
    vision = config.vision_config
    vision.projection_dim, vision.architectures = config.projection_dim, ["CLIPVisionModelWithProjection"]
    extra = {"config.json": vision.to_json_string()}
    if (base / "preprocessor_config.json").is_file():
        extra["preprocessor_config.json"] = (base / "preprocessor_config.json").read_text()
    own, start = open_checkpoint(source), open_checkpoint(base)
    wanted, names = vision_names(start), vision_names(own)
    projection = {n: s for n, s in wanted.items() if n.startswith("visual_projection.")}
    if set(wanted) != set(names) | set(projection):
        sys.exit(f"{source} is not a vision tower of {base}: {', '.join(sorted(set(wanted) ^ set(names))[:4])} ...")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in wanted:
            yield name, own[names[name]] if name in names else start[projection[name]]

    return write_checkpoint(out, tensors(), extra_files=extra)


def prepare_task(name: str, args: argparse.Namespace, text: Path) -> dict[str, Any]:
    """A task's entry in the task file, its rows drawn."""
    source, folder, out = TASKS[name], args.data / name, args.out / "data" / name
    files = fetch_data(source, folder)
    classes = class_names(source, files["train"], folder)
    paths = {split: out / f"{split}.parquet" for split in ("train", "validation", "test")}
    counts = {"train": args.calibration, "validation": args.validation, "test": args.test}
    drawn = json.dumps([counts, args.seed])
    if not (out / "drawn.json").is_file() or (out / "drawn.json").read_text() != drawn:
        draw(files["train"], {paths["train"]: counts["train"]}, args.seed)
        draw(files["test"], {paths[s]: counts[s] for s in ("validation", "test")}, args.seed)
        (out / "drawn.json").write_text(drawn)
    shot = {"templates": list(source.templates), "text": str(text.resolve())}
    splits = {split: str(path.relative_to(args.out)) for split, path in paths.items()}
    return {"kind": "image_classification", **splits, "classes": classes, "zero_shot": shot}


def write_recipe(args: argparse.Namespace) -> Path:
    """Download, prepare, and write recipe.yaml and tasks.yaml to --out; returns the recipe's path."""
    name = MODELS[args.model]
    clip = fetch_model("openai", name, args.models)
    prepare(clip, clip, args.out / "models" / "base")
    tasks, experts = {}, {}
    for task in args.tasks:
        expert = fetch_model("tanganke", f"{name}_{TASKS[task].expert}", args.models)
        prepare(expert, clip, args.out / "models" / task)
        experts[task] = f"models/{task}"
        tasks[task] = prepare_task(task, args, clip)
    recipe = {"base": "models/base", "experts": experts, "tasks": "tasks.yaml", "out": str(args.out / "run")}
    recipe |= {key: getattr(args, key) for key in ("anchor", "calibration", "budget", "seed")}
    (args.out / "tasks.yaml").write_text(yaml.safe_dump(tasks, sort_keys=False))
    (args.out / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return Path(args.out / "recipe.yaml")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="B/32")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help="some of them")
    parser.add_argument("--anchor", default="tsv", help="see: bmm anchors")
    parser.add_argument("--budget", type=int, default=50, help="trials")
    parser.add_argument("--calibration", type=int, default=64, help="training images a task for Grams")
    parser.add_argument("--validation", type=int, default=200, help="test images a task that steer the search")
    parser.add_argument("--test", type=int, default=1000, help="test images a task that are scored once; 0: all others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--models", type=Path, default=Path("clip-cache/models"), help="where models are, or come to be"
    )
    parser.add_argument("--data", type=Path, default=Path("clip-cache/data"), help="where data are, or come to be")
    parser.add_argument("--out", type=Path, default=Path("runs/clip"))
    parser.add_argument("--prepare", action="store_true", help="write everything that bmm tune needs, and stop there")
    parser.add_argument("flags", nargs="*", help="after --: flags of bmm tune")
    return parser.parse_args(words)


def resumable(args: argparse.Namespace) -> bool:
    """Whether --out holds a study of these settings; ends the program where it is one of others."""
    fixed = {
        key: getattr(args, key) for key in ("model", "tasks", "anchor", "calibration", "validation", "test", "seed")
    }
    note = args.out / "settings.json"
    if not (args.out / "run" / "study.db").exists():
        args.out.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(fixed))
        return False
    begun = json.loads(note.read_text())
    if other := [f"{key} {begun[key]}" for key in fixed if fixed[key] != begun[key]]:
        sys.exit(f"{args.out} holds a study with {', '.join(other)}\nonly --budget may change; choose another --out")
    return True


def main(words: Sequence[str] | None = None) -> int:
    args = arguments(words)
    if resumable(args):
        command = ["tune", "--resume", str(args.out / "run"), "--budget", str(args.budget)]
    else:
        command = ["tune", "--recipe", str(write_recipe(args))]
    print("bmm", *command, *args.flags, flush=True)
    if args.prepare:
        return 0
    start = [sys.executable, "-c", "from bmm_cli.main import main; main()"]
    return subprocess.run([*start, *command, *args.flags]).returncode


if __name__ == "__main__":
    sys.exit(main())
