"""The twenty tasks: five disjoint splits each (joint share, train, calibration, validation, test)."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from . import sources
from .glyphs import LOOKS, PRETRAINING, SCRIPTS, faces, render, split_families, stream

log = logging.getLogger("bmm.zoo.build")

JOINT, CALIBRATION, VALIDATION, TEST = 600, 256, 256, 1200
GLYPH_TRAIN = 12000
EMOJI_TEST = 1000
Split = tuple[np.ndarray, np.ndarray]


def balanced_order(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order in which every prefix holds the classes in nearly equal shares."""
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        rank[rows] = (np.arange(len(rows)) + rng.uniform(0, 1, len(rows))) / len(rows)
    return np.argsort(rank, kind="stable")


def cut(images: np.ndarray, labels: np.ndarray, sizes: dict[str, int], name: str) -> dict[str, Split]:
    """Cut one pool into disjoint splits of the given sizes, in a class-balanced order; the rest is 'train'."""
    order = balanced_order(labels, stream(f"cut {name}"))
    parts, start = {}, 0
    for part, n in sizes.items():
        rows = order[start : start + n]
        parts[part] = (images[rows], labels[rows])
        start += n
    if "train" not in parts:
        parts["train"] = (images[order[start:]], labels[order[start:]])
    return parts


SMALL = {"joint": JOINT, "calibration": CALIBRATION, "validation": VALIDATION}


def glyph_task(work: Path, script: str) -> dict[str, Split]:
    text, style, trouble = SCRIPTS[script]
    fonts = split_families(work, script)
    sizes = {"joint": JOINT, "calibration": CALIBRATION, "train": GLYPH_TRAIN}
    parts = {p: render(fonts["train"], text, n, (style,), f"{script} {p}", trouble) for p, n in sizes.items()}
    for part, n in (("validation", VALIDATION), ("test", TEST)):
        parts[part] = render(fonts[part], text, n, (style,), f"{script} {part}", trouble)
    return parts


def emoji_task(work: Path, kind: str) -> dict[str, Split]:
    """Emoji pictures by category, vendor or skin tone, split by emoji: no emoji is in two splits of any task."""
    data = sources.emoji(work)
    groups = stream("emoji groups").permutation(data["group"].max() + 1)
    if kind == "skin_tone":
        rows, labels = np.flatnonzero(data["skin"] >= 0), data["skin"]
    else:
        rows, labels = np.flatnonzero(data["skin"] < 0), data[{"vendor": "vendor", "category": "category"}[kind]]
    position = groups[data["group"][rows]]  # a random but fixed place for every emoji
    order = rows[np.argsort(position, kind="stable")]
    place = np.sort(position)
    # Walk through the emoji in that order; cut only between emoji.
    parts, start = {}, 0
    sizes = {"test": EMOJI_TEST, "validation": VALIDATION, "calibration": CALIBRATION, "joint": JOINT}
    for part, n in sizes.items():
        stop = start + n
        while stop < len(order) and place[stop] == place[stop - 1]:
            stop += 1
        chosen = stream(f"emoji {kind} {part}").permutation(order[start:stop])[:n]
        parts[part] = (data["images"][chosen] // 8 * 8, labels[chosen].astype(np.int64))
        start = stop
    parts["train"] = (data["images"][order[start:]] // 8 * 8, labels[order[start:]].astype(np.int64))
    return parts


def task_splits(work: Path, name: str) -> dict[str, Split]:
    """The five splits of a task, as (images uint8 (n, 1 or 3, 32, 32), labels int64 (n,)); cached on disk."""
    cache = work / "tasks" / f"{name}.npz"
    if not cache.exists():
        if name == "fashion_mnist":
            pools = sources.fashion_mnist(work)
            parts = cut(*pools["train"], SMALL, name)
            parts["test"] = cut(*pools["test"], {"test": TEST}, name + " test")["test"]
        elif name == "mnist":
            parts = cut(*sources.mnist(work), SMALL | {"test": TEST}, name)
        elif name.startswith("emoji_"):
            parts = emoji_task(work, name.removeprefix("emoji_"))
        else:
            parts = glyph_task(work, name)
        cache.parent.mkdir(parents=True, exist_ok=True)
        arrays = {f"{part}_{axis}": a for part, pair in parts.items() for axis, a in zip("xy", pair, strict=True)}
        temporary = cache.with_suffix(".tmp.npz")
        np.savez(temporary, **arrays)
        temporary.rename(cache)
        log.info("task %s: %s", name, {part: len(y) for part, (_, y) in parts.items()})
    with np.load(cache) as raw:
        return {p: (raw[f"{p}_x"], raw[f"{p}_y"]) for p in ("joint", "train", "calibration", "validation", "test")}


def pretraining(work: Path, per_class: int = 60) -> dict[str, Split]:
    """Pretraining pools: glyphs of the scripts that are no task, in every look, and clip art by folder."""
    cache = work / "tasks" / "pretraining.npz"
    if not cache.exists():
        images, labels, first = [], [], 0
        for script, text in PRETRAINING.items():
            by_family = faces(work, text, 0.9)
            files = [f for family in by_family.values() for f in family]
            x, y = render(files, text, per_class * len(text), LOOKS, f"pretraining {script}")
            images.append(x)
            labels.append(y + first)
            first += len(text)
        clip_x, clip_y = sources.clipart(work)
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(".tmp.npz")
        np.savez(temporary, gx=np.concatenate(images), gy=np.concatenate(labels), cx=clip_x, cy=clip_y)
        temporary.rename(cache)
        log.info("pretraining: %d glyphs of %d classes, %d pictures", sum(map(len, labels)), first, len(clip_y))
    with np.load(cache) as raw:
        return {"glyph": (raw["gx"], raw["gy"]), "clipart": (raw["cx"], raw["cy"])}
