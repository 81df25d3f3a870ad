"""What the cross-checks share: tiny checkpoints, both sides of a comparison, and the table."""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from environments import environment

Model = dict[str, Tensor]

HIDDEN, INTERMEDIATE, VOCABULARY, EXPERTS = 64, 96, 128, 3


@dataclass(frozen=True)
class Row:
    """One comparison: our method and knobs, the peer's function, and what its definition does otherwise.

    ``alone``: ours merges every tensor as a model of its own, as peers do that trim tensor by tensor. ``experts``: the
    first so many of them. ``statistics``: "grams" or "fisher" where the method needs them.
    """

    ours: str
    theirs: str
    differs: str = ""
    knobs: dict[str, Any] = field(default_factory=dict)
    alone: bool = False
    experts: int = EXPERTS
    statistics: str = ""

    def key(self, number: int) -> str:
        """File name of the peer's result."""
        return f"theirs-{number}.safetensors"


def shapes() -> dict[str, tuple[int, ...]]:
    """One layer of a Llama: matrices both wide and tall, embeddings, and vectors."""
    at = "model.layers.0"
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    found |= {f"{at}.self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
    found |= {f"{at}.mlp.{p}_proj.weight": (INTERMEDIATE, HIDDEN) for p in ("gate", "up")}
    found |= {f"{at}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE)}
    found |= {f"{at}.{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def write_family(folder: Path) -> None:
    """Base, experts, and for each expert Grams of random inputs and a random diagonal Fisher, all float32."""
    generator = torch.Generator().manual_seed(0)
    base = {n: 0.05 * torch.randn(s, generator=generator) for n, s in shapes().items()}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": 1,
        "intermediate_size": INTERMEDIATE, "num_attention_heads": 4, "num_key_value_heads": 4,
        "vocab_size": VOCABULARY, "torch_dtype": "float32", "tie_word_embeddings": False,
    }  # fmt: skip
    for t in range(EXPERTS + 1):
        place = folder / ("base" if t == 0 else f"e{t}")
        place.mkdir(parents=True)
        own = {n: 0.008 * torch.randn(w.shape, generator=generator) for n, w in base.items()}
        if t == 0:
            shared = {n: 0.006 * torch.randn(w.shape, generator=generator) for n, w in base.items()}
        step = {n: w + shared[n] for n, w in own.items()}  # changes with a positive cosine, as fine-tuning's have
        model = base if t == 0 else {n: w + step[n] for n, w in base.items()}
        save_file(model, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(config))
        inputs = {n: torch.randn(256, w.shape[1], generator=generator) for n, w in base.items() if w.dim() == 2}
        save_file({n: x.mT @ x / 256 for n, x in inputs.items()}, place / "grams.statistic")
        squares = {n: torch.randn(w.shape, generator=generator).square() for n, w in base.items()}
        save_file(squares, place / "fisher.statistic")


def read(folder: Path, count: int = EXPERTS, file: str = "model.safetensors") -> tuple[Model, list[Model]]:
    """Base and the first ``count`` experts, or a statistic of theirs."""
    return load_file(folder / "base" / file), [load_file(folder / f"e{t + 1}" / file) for t in range(count)]


def task_vectors(folder: Path, count: int = EXPERTS) -> tuple[Model, list[Model]]:
    """The base, and expert minus base."""
    base, experts = read(folder, count)
    return base, [{n: expert[n] - w for n, w in base.items()} for expert in experts]


def ours(row: Row, folder: Path) -> Model:
    """The row's merge by bmm."""
    from bmm.anchors import merge

    base, experts = read(folder, row.experts)
    options: dict[str, Any] = dict(row.knobs)
    if row.statistics:
        found = read(folder, row.experts, f"{row.statistics}.statistic")[1]
        options["fisher"] = found
        if row.statistics == "grams":
            options = dict(row.knobs) | {"grams": {n: [f[n] for f in found] for n in found[0]}}
    if not row.alone:
        return merge(row.ours, base, experts, **options)
    return {n: merge(row.ours, {n: w}, [{n: e[n]} for e in experts], **options)[n] for n, w in base.items()}


def difference(row: Row, number: int, folder: Path) -> list[str]:
    """The row of the table: largest difference, absolute and relative to the largest merged change."""
    from bmm.anchors import ANCHORS

    named = f"{row.ours} {' '.join(f'{k}={v}' for k, v in row.knobs.items())}".strip()
    if row.ours not in ANCHORS:
        return [named, row.theirs, "", "", "not in the registry: skipped"]
    mine, peers, base = ours(row, folder), load_file(folder / row.key(number)), read(folder, 0)[0]
    if set(mine) != set(peers):
        raise SystemExit(f"{row.theirs}: other tensors than ours: {sorted(set(mine) ^ set(peers))}")
    gap = max(float((mine[n].double() - peers[n].double()).abs().max()) for n in mine)
    size = max(float((mine[n].double() - base[n].double()).abs().max()) for n in mine)
    how = named + ", tensor by tensor" * row.alone + f", {row.experts} experts" * (row.experts != EXPERTS)
    return [how, row.theirs, f"{gap:.1e}", f"{gap / size:.1e}", row.differs]


def main(package: str, version: str, script: str, rows: Sequence[Row], peer: Callable[[Path, Row], Model]) -> None:
    """Run as a script: in the peer's environment for its side (``--peer``), in ours for the rest."""
    parser = argparse.ArgumentParser(description=f"bmm against {package} {version}, method by method")
    parser.add_argument("--work", type=Path, default=Path("runs/crosscheck"))
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peer:
        for number, row in enumerate(rows):
            result = {n: w.detach().contiguous().clone() for n, w in peer(args.peer, row).items()}
            save_file(result, args.peer / row.key(number))
        return
    folder = args.work.absolute() / package
    shutil.rmtree(folder, ignore_errors=True)
    write_family(folder)
    command = [str(environment(package)), script, "--peer", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    from bmm.report import markdown

    header = ["bmm", f"{package} {version}", "absolute", "relative", "what differs"]
    print(f"\n{package} {version}, {datetime.date.today()}, {EXPERTS} experts, float32\n")
    print(markdown(header, [difference(row, number, folder) for number, row in enumerate(rows)]))
