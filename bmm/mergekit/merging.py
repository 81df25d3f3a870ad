"""A mergekit recipe run: from the recipe to a merged checkpoint, one tensor of all models in memory at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ..anchors import merge_each
from ..checkpoint import ModelPool
from ..checkpoint.agreement import info_of
from ..checkpoint.tied import INPUT_EMBEDDINGS
from ..errors import RecipeError, VocabularyError, did_you_mean
from ..groups import depth_of
from ..loading import find_device
from ..notation import StateDict
from ..progress import Progress, silent
from ..recipe import storage_dtype
from ..report import merge_card
from ..writing import counted, merge_key, write_merge
from .config import MergekitConfig
from .plan import Plan

RECIPE = "mergekit_config.yml"
"""Name of the recipe's copy next to the merged model."""


def merge_mergekit(
    recipe: str | Path | Mapping[str, Any] | MergekitConfig,
    *,
    out: str | Path | None = None,
    models: Mapping[str, str | Path] | None = None,
    skip: Sequence[str] = (),
    heads: str = "refuse",
    dtype: str = "same",
    device: str = "cpu",
    shard_gib: float = 4.0,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = silent,
) -> StateDict | Path:
    """Merge as a recipe of mergekit says, to the result mergekit gives; docs/mergekit.md tells what is read.

    Args:
        recipe: its file, or its content as a mapping.
        out: write a checkpoint there and return its path; otherwise return the tensors (float32 or wider).
        models: folders of models by their name in the recipe, where that is not a folder (nothing is downloaded).
        skip, heads: parameters to leave out, and what is done with task heads, as in a recipe of bmm.
        dtype: of the merged checkpoint; same: what the recipe says, else what the models' dtypes promote to.
        seed: of the masks that DARE and DELLA draw.

    Arithmetic is in float32 or float64 whatever the recipe's dtypes. A write that was stopped goes on from its finished
    shards.

    Raises:
        RecipeError: what is wrong or not supported, by its key path; CheckpointError, MergeError, WriteError.
    """
    config = _config(recipe)
    plan = Plan.of(config)
    folders = _folders(plan, models or {})
    kept = storage_dtype(dtype)
    inputs = [folders[source.model] for source in plan.inputs]
    base = folders[plan.origin] if plan.origin else inputs[0]
    names = [source.model for source in plan.inputs]
    pool = _open(config, base, inputs, skip=skip, task_names=names, heads=heads)
    _require_layers(config, pool)
    ways = plan.ways(pool.float_names, _spoken(pool), seed)
    place = find_device(device)
    for notice in (*plan.notices, *pool.notices):
        progress("notice", 1, 1, notice)
    targets = _dtypes(config, pool, kept)
    wide = {name: torch.promote_types(target, torch.float32) for name, target in targets.items()}

    def stream(done: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        left = [name for name in pool.names if name not in done]
        return merge_each(pool.base, pool.experts, ways.__getitem__, names=left, dtypes=wide, device=place)

    pairs = counted(pool, stream, progress)
    if out is None:
        return pool.with_ties(dict(pairs(frozenset())))
    named = {"base": str(base), "experts": {s.model: str(folders[s.model]) for s in plan.inputs}, "seed": seed}
    text = config.text if config.text.endswith("\n") else config.text + "\n"
    command = f"bmm merge --from-mergekit {RECIPE} --out {Path(out).name}"
    texts = {"README.md": merge_card(f"mergekit recipe `{config.method}`", named, text, command), RECIPE: text}
    key = merge_key(pool, text, named, dtype, shard_gib, list(skip), heads)
    return write_merge(
        pool, pairs, Path(out), texts, dtypes=_one(targets), shard_gib=shard_gib, overwrite=overwrite, key=key
    )


def _config(recipe: str | Path | Mapping[str, Any] | MergekitConfig) -> MergekitConfig:
    if isinstance(recipe, MergekitConfig):
        return recipe
    if isinstance(recipe, Mapping):
        return MergekitConfig.parse(yaml.safe_dump(dict(recipe), sort_keys=False))
    return MergekitConfig.load(recipe)


def _folders(plan: Plan, given: Mapping[str, str | Path]) -> dict[str, Path]:
    """The folder of every model of the recipe; relative ones are looked for here, then next to the recipe."""
    config = plan.config
    keys = {source.model: f"{source.path}.model" for source in config.sources}
    if config.base:
        keys.setdefault(config.base, "base_model")
    for name in given:
        if name not in keys:
            raise RecipeError(f"{config.where}: names no model {name!r}", did_you_mean(str(name), keys))
    found = {}
    for name, key in keys.items():
        path = Path(given.get(name, name)).expanduser()
        beside = Path(config.where).parent / path
        found[name] = path if path.exists() or not beside.exists() else beside
        if not found[name].exists():
            raise RecipeError(
                f"{config.where}: {key}: no folder {str(path)!r}",
                f"bmm downloads nothing: download the model, and say where it is: --expert {name}=FOLDER",
            )
    return found


def _open(config: MergekitConfig, base: Path, inputs: Sequence[Path], **options: Any) -> ModelPool:
    """The models by row number, as mergekit takes them; with the same tokens in the same rows where the recipe has a
    tokenizer for them all."""
    try:
        return ModelPool.open(base, inputs, vocabulary="refuse" if config.tokenizer else "rows", **options)
    except VocabularyError as error:
        asked = f" ({config.where}: tokenizer {config.tokenizer!r})" if config.tokenizer else ""
        raise VocabularyError(error.message + asked, "use models with one tokenizer, row by row") from None


def _require_layers(config: MergekitConfig, pool: ModelPool) -> None:
    layers = len({depth_of(name) for name in pool.names} - {None})
    if config.layers and layers != config.layers:
        raise RecipeError(
            f"{config.where}: slices[0].sources[0].layer_range: {config.layers} layers, the models have {layers}",
            "take all layers: models assembled from parts are not supported",
        )


def _spoken(pool: ModelPool) -> dict[str, str]:
    """Of tied weights, the name that filters see: the input embedding's."""
    spoken = {}
    for group in pool.tied:
        inputs = [name for name in group if not set(name.split(".")).isdisjoint(INPUT_EMBEDDINGS)]
        spoken[group[0]] = (inputs or group)[0]
    return spoken


def _dtypes(config: MergekitConfig, pool: ModelPool, kept: torch.dtype | None) -> dict[str, torch.dtype]:
    """The dtype in which each floating tensor is stored."""
    asked = kept or (storage_dtype(config.out_dtype or config.dtype) if config.out_dtype or config.dtype else None)
    models = (pool.base, *pool.experts)
    return {
        name: asked or reduce(torch.promote_types, (info_of(model, name).dtype for model in models))
        for name in pool.float_names
    }


def _one(targets: Mapping[str, torch.dtype]) -> Mapping[str, torch.dtype] | torch.dtype:
    """One dtype where all tensors have the same, so that config.json comes to say it."""
    kinds = set(targets.values())
    return kinds.pop() if len(kinds) == 1 else targets
