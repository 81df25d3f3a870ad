"""Merged models to disk: a checkpoint like the base's, with card and recipe, from memory or module by module."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from .adapting import write_low_rank
from .checkpoint import Checkpoint, write_checkpoint
from .checkpoint.heads import write_with_heads
from .errors import MergeError
from .notation import StateDict
from .recipe import storage_dtype
from .records import Hyperparameters
from .run import Run
from .statistics import anchor_needs
from .streamed import StreamedMerge

ELSEWHERE = ("out", "cache", "device", "max_memory", "budget", "workers", "executor")
"""Recipe keys that say where and how long, not what: a merge that is taken up again may have other ones."""


Anchor = Callable[[Collection[str]], Iterator[tuple[str, Tensor]]]


def streamed_merge(run: Run) -> tuple[StreamedMerge, Anchor]:
    """A merge at one point, module by module: give its `at` a point and the anchor, which the function streams, but for
    the names it is called with."""
    recipe = run.recipe
    groups: dict[str, Any] = {"scheme": recipe.groups, "bands": recipe.bands, "overrides": recipe.group}
    options = {**run.regression(), **groups, "device": run.device}
    if recipe.grams == "datafree" or recipe.inputs == "experts":
        known = recipe.grams != "datafree" or "grams" in anchor_needs(recipe.anchor)
        found = run.collect_grams() if known else None
        grams = None if recipe.grams == "datafree" else found
        return StreamedMerge(run.pool, grams, **options), lambda done: run.anchor_pairs(grams=found, done=done)
    tensors, grams = run.evidence()
    return StreamedMerge(run.pool, grams, **options), lambda done: ((n, t) for n, t in tensors.items() if n not in done)


def write_model(run: Run, tensors: StateDict, folder: Path, card: str, *, overwrite: bool) -> Path:
    """Write merged tensors in memory as a checkpoint; returns its folder. Raises `WriteError`."""
    return _write(run, ((n, tensors[n].cpu()) for n in run.pool.names), folder, card, overwrite, owned=False)


def write_stream(
    run: Run,
    tensors: Callable[[Collection[str]], Iterable[tuple[str, Tensor]]],
    folder: Path,
    card: str,
    *,
    overwrite: bool,
    point: Hyperparameters | None = None,
) -> Path:
    """Write tensors as they are merged, and give each of them away; returns the folder.

    ``tensors`` gives all names but those it is called with: where an earlier write of the same merge was stopped, its
    finished shards are taken over. Progress is "merge", in bytes of the merged model.
    Raises `WriteError`, and whatever the merge raises.
    """
    sizes = {name: run.pool.info(name).nbytes for name in run.pool.names}

    def counted(done: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
        if done:
            run.progress("notice", 1, 1, f"{len(done)} of {len(sizes)} tensors are there from an earlier start")
        position = sum(sizes.get(name, 0) for name in done)
        try:
            for name, tensor in tensors(done):
                yield name, tensor
                position += sizes[name]
                run.progress("merge", position, sum(sizes.values()), name)
        except MergeError:
            run.pool.check_finite()  # NaN and Inf are found while merging: say which checkpoint holds them
            raise

    return _write(run, counted, folder, card, overwrite, owned=True, key=_key(run, point))


def _write(
    run: Run, tensors: Any, folder: Path, card: str, overwrite: bool, owned: bool, key: int | None = None
) -> Path:
    """A checkpoint, or the adapter that the recipe's ``adapter_rank`` asks for; experts' heads where they are kept."""
    recipe, base = run.recipe, run.pool.base
    run.pool.refuse_expert(folder)
    texts = {"README.md": card, "bmm_recipe.yaml": recipe.to_yaml() or "{}\n"}

    def write(place: Path, overwrite: bool, key: int | None) -> Path:
        if recipe.adapter_rank:
            pairs = tensors(frozenset()) if callable(tensors) else tensors
            return write_low_rank(run, pairs, place, texts, overwrite=overwrite)
        return write_checkpoint(
            place,
            tensors,
            like=base if isinstance(base, Checkpoint) else None,
            dtypes=storage_dtype(recipe.dtype),
            tied=run.pool.tied,
            max_shard_bytes=int(recipe.shard_gib * 2**30),
            extra_files=texts,
            overwrite=overwrite,
            owned=owned,
            key=key,
        )

    if not run.pool.heads:
        return write(folder, overwrite, key)
    inputs = (base.path,) if isinstance(base, Checkpoint) else ()
    return write_with_heads(folder, run.pool.heads, overwrite, lambda place: write(place, False, None), inputs)


def _key(run: Run, point: Hyperparameters | None) -> int | None:
    """A number that stands for all that the merged tensors depend on; None where that is not known without reading."""
    stamp = run.pool.stamp()
    if not stamp:
        return None
    recipe = {k: v for k, v in run.recipe.to_dict().items() if k not in ELSEWHERE}
    text = json.dumps([stamp, recipe, point.to_json() if point else None, version("bmm-tuner")], sort_keys=True)
    return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
