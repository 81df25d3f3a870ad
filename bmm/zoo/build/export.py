"""Write what was trained into the package and the examples, and measure it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ...anchors import merge
from ...notation import StateDict
from .. import HOME, VIT8, VIT20
from ..vit import ViTConfig
from . import train
from .tasks import task_splits

log = logging.getLogger("bmm.zoo.build")
EXTRA = HOME.parents[2] / "examples" / "vit20" / "zoo"


def save_model(folder: Path, state: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ViTConfig().save(folder)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})


def export(work: Path) -> None:
    """Base, experts, heads and the three shipped splits of every task; then the README's table."""
    base, heads = train.base_and_heads(work)
    save_model(HOME / "base", base)
    rows = []
    for name in VIT20:
        folder = HOME if name in VIT8 else EXTRA
        (folder / "data").mkdir(parents=True, exist_ok=True)
        state = train.expert(work, name)
        save_model(folder / "experts" / name, state)
        splits = task_splits(work, name)
        arrays = {"calibration_x": splits["calibration"][0]}
        for part in ("validation", "test"):
            images, labels = splits[part]
            arrays |= {f"{part}_x": images, f"{part}_y": labels.astype(np.uint8)}
        np.savez_compressed(folder / "data" / f"{name}.npz", **arrays)
        row = {"task": name, "classes": len(heads[name]["bias"]), "n": len(splits["test"][1])}
        for model, tensors in (("base", base), ("expert", state)):
            row[model] = train.accuracy(tensors, heads[name], splits["test"])
        rows.append(row)
        log.info("%s", row)
    for folder, names in ((HOME, VIT8), (EXTRA, [n for n in VIT20 if n not in VIT8])):
        flat = {f"{n}.{k}": v.contiguous() for n in names for k, v in heads[n].items()}
        save_file(flat, folder / "heads.safetensors")
        for path in folder.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes for the owner alone; the package is for everybody
    (HOME / "accuracy.json").write_text(json.dumps(rows, indent=1) + "\n")
    found = {zoo: conditions(work, names) for zoo, names in (("vit8", VIT8), ("vit20", VIT20))}
    log.info("conditions: %s", found)
    (HOME / "conditions.json").write_text(json.dumps(found, indent=1) + "\n")
    (work / "table.md").write_text(table(rows))


def conditions(work: Path, names: tuple[str, ...]) -> dict[str, float]:
    """What the zoo is accepted on, before any other merge: task arithmetic at the scale that is best on validation.

    Returns mean test accuracies of base, experts and task arithmetic, its scale, and the share of the gap it recovers.
    """
    base, heads = train.base_and_heads(work)
    experts = {n: train.expert(work, n) for n in names}
    splits = {n: {part: task_splits(work, n)[part] for part in ("validation", "test")} for n in names}

    def mean(state_of: Callable[[str], StateDict], part: str) -> float:
        return sum(train.accuracy(state_of(n), heads[n], splits[n][part]) for n in names) / len(names)

    def merged(scale: float) -> StateDict:
        return merge("task_arithmetic", base, list(experts.values()), dtype=torch.float32, scale=scale)

    candidates = {s: merged(s) for s in np.arange(0.04, 0.42, 0.02).round(2).tolist()}
    scale = max(candidates, key=lambda s: mean(lambda _: candidates[s], "validation"))
    low, high = mean(lambda _: base, "test"), mean(experts.__getitem__, "test")
    arithmetic = mean(lambda _: candidates[scale], "test")
    return {"base": low, "experts": high, "task_arithmetic": arithmetic, "scale": scale,
            "recovered": (arithmetic - low) / (high - low)}  # fmt: skip


def table(rows: list[dict]) -> str:
    """Markdown table of base and expert accuracy with standard errors, and the means over 8 and 20 tasks."""
    lines = ["| task | classes | n | base | expert |", "|---|---|---|---|---|"]
    for r in rows:
        cells = [f"{100 * r[m]:.1f} ± {100 * math.sqrt(r[m] * (1 - r[m]) / r['n']):.1f}" for m in ("base", "expert")]
        lines.append(f"| {r['task']} | {r['classes']} | {r['n']} | {cells[0]} | {cells[1]} |")
    for label, names in (("mean of vit8", VIT8), ("mean of vit20", VIT20)):
        chosen = [r for r in rows if r["task"] in names]
        base, expert = (100 * sum(r[m] for r in chosen) / len(chosen) for m in ("base", "expert"))
        lines.append(f"| **{label}** | | | **{base:.1f}** | **{expert:.1f}** |")
    return "\n".join(lines) + "\n"
