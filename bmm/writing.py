"""Merged models to disk: a checkpoint like the base's, with card and recipe, from memory or module by module."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapting import write_low_rank
from .checkpoint import Checkpoint, ModelPool, write_checkpoint
from .checkpoint.heads import write_with_heads
from .errors import CheckpointError, MergeError
from .notation import StateDict
from .progress import Progress
from .recipe import storage_dtype
from .records import Hyperparameters
from .run import Run
from .statistics import anchor_needs
from .streamed import StreamedMerge

ELSEWHERE = ("out", "cache", "device", "max_memory", "budget", "workers", "executor")
"""Recipe keys that say where and how long, not what: a merge that is taken up again may have other ones."""


Anchor = Callable[[Collection[str]], Iterator[tuple[str, Tensor]]]
Resumed = Callable[[frozenset[str]], Iterator[tuple[str, Tensor]]]
"""Merged tensors, but for the names it is called with: what an earlier write has finished."""


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
    recipe = {k: v for k, v in run.recipe.to_dict().items() if k not in ELSEWHERE}
    key = merge_key(run.pool, recipe, point.to_json() if point else None)
    return _write(run, counted(run.pool, tensors, run.progress), folder, card, overwrite, owned=True, key=key)


def counted(
    pool: ModelPool, tensors: Callable[[Collection[str]], Iterable[tuple[str, Tensor]]], progress: Progress
) -> Resumed:
    """``tensors`` (as in `write_stream`) with progress in bytes; where the merge finds NaN or Inf, the error names the
    checkpoint that holds them."""
    sizes = {name: pool.info(name).nbytes for name in pool.names}

    def pairs(done: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
        if done:
            progress("notice", 1, 1, f"{len(done)} of {len(sizes)} tensors are there from an earlier start")
        position = sum(sizes.get(name, 0) for name in done)
        try:
            for name, tensor in tensors(done):
                yield name, tensor
                position += sizes[name]
                progress("merge", position, sum(sizes.values()), name)
        except MergeError as error:
            try:
                pool.check_finite()
            except CheckpointError as found:
                raise found from error
            raise

    return pairs


def _write(
    run: Run, tensors: Any, folder: Path, card: str, overwrite: bool, owned: bool, key: int | None = None
) -> Path:
    """A checkpoint, or the adapter that the recipe's ``adapter_rank`` asks for; experts' heads where they are kept."""
    recipe = run.recipe
    texts = {"README.md": card, "bmm_recipe.yaml": recipe.to_yaml() or "{}\n"}

    def adapter(place: Path, overwrite: bool) -> Path:
        pairs = tensors(frozenset()) if callable(tensors) else tensors
        return write_low_rank(run, pairs, place, texts, overwrite=overwrite)

    return write_merge(
        run.pool, tensors, folder, texts, dtypes=storage_dtype(recipe.dtype), shard_gib=recipe.shard_gib,
        overwrite=overwrite, owned=owned, key=key, write=adapter if recipe.adapter_rank else None,
    )  # fmt: skip


def write_merge(
    pool: ModelPool,
    tensors: Resumed | Iterable[tuple[str, Tensor]],
    folder: Path,
    texts: Mapping[str, str],
    *,
    dtypes: Mapping[str, torch.dtype] | torch.dtype | None,
    shard_gib: float,
    overwrite: bool,
    owned: bool = True,
    key: int | None = None,
    write: Callable[[Path, bool], Path] | None = None,
) -> Path:
    """Write a merge of the pool as a checkpoint like the base's, or by ``write``, called with a folder and
    ``overwrite``; the experts' heads beside it where the pool keeps them. Other arguments as of `write_checkpoint`."""
    base = pool.base
    pool.refuse_expert(folder)

    def model(place: Path, overwrite: bool, key: int | None) -> Path:
        if write is not None:
            return write(place, overwrite)
        return write_checkpoint(
            place,
            tensors,
            like=base if isinstance(base, Checkpoint) else None,
            dtypes=dtypes,
            tied=pool.tied,
            max_shard_bytes=int(shard_gib * 2**30),
            extra_files=texts,
            overwrite=overwrite,
            owned=owned,
            key=key,
        )

    if not pool.heads:
        return model(folder, overwrite, key)
    inputs = (base.path,) if isinstance(base, Checkpoint) else ()
    return write_with_heads(folder, pool.heads, overwrite, lambda place: model(place, False, None), inputs)


def merge_key(pool: ModelPool, *what: Any) -> int | None:
    """A number that stands for the pool and for ``what`` (of JSON) else the merged tensors depend on; None where the
    pool is not known without reading."""
    stamp = pool.stamp()
    if not stamp:
        return None
    text = json.dumps([stamp, *what, version("bmm-tuner")], sort_keys=True)
    return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
