"""Merges that keep masks: from a recipe to the unified model with its masks, and back to one task's model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .anchors import MaskedModels, emr_compress, get, resolve_knobs, tall_compress
from .checkpoint import Checkpoint, write_checkpoint
from .errors import RecipeError, WriteError
from .notation import StateDict
from .progress import Progress, silent
from .recipe import DTYPES, Recipe
from .report import merge_card
from .run import Run

METHODS = ("emr", "consensus_ta")


def merge_masked(recipe: Recipe, out: Path, overwrite: bool = False, progress: Progress = silent) -> Path:
    """Write the unified model of the recipe's anchor to ``out`` with a mask for every task; return the folder.

    For emr the unified model is the merge itself; for consensus_ta it is the sum of task vectors that the TALL masks
    select from. Two passes over the experts; T bits a parameter and one tensor of the T experts are in memory.

    Raises:
        RecipeError: an anchor without masks, or a scale, which masks leave no room for; further errors as `bmm.merge`.
    """
    if recipe.anchor not in METHODS:
        raise RecipeError(f"anchor {recipe.anchor} has no masks", f"choose {' or '.join(METHODS)}")
    given = sorted(set(recipe.knobs) - {"mask_strength"})
    if given:
        raise RecipeError(f"{given[0]} has no say in a merge with masks", "drop it: masks stand on the unscaled vector")
    run = Run(recipe, progress=progress, need_tasks=False)
    pool = run.pool
    if out.resolve() in [source.path.resolve() for source in pool.experts if isinstance(source, Checkpoint)]:
        raise WriteError(f"{out} is one of the experts", "choose another output folder")
    knobs = resolve_knobs(get(recipe.anchor), recipe.knobs)
    masked = (emr_compress if recipe.anchor == "emr" else tall_compress)(
        pool.base,
        pool.experts,
        run.experts,
        weights=run.weights if any(a != 1 for a in run.weights) else None,
        tied=pool.aliases,
        device=run.device,
        lazy=True,
        progress=lambda _, done, total: progress("merge", done, total),
        **({"mask_strength": knobs["mask_strength"]} if "mask_strength" in knobs else {}),
    )
    card = merge_card(
        f"unified merge `{recipe.anchor}` with a mask for each of {', '.join(run.experts)}"
        " (`bmm reconstruct` makes a task's own model)",
        recipe.to_dict(),
        recipe.to_yaml(),
        f"bmm merge --recipe bmm_recipe.yaml --masks --out {out.name}",
    )
    return masked.save(
        out,
        dtype=_dtype(recipe.dtype),
        max_shard_bytes=int(recipe.shard_gib * 2**30),
        extra_files={"README.md": card, "bmm_recipe.yaml": recipe.to_yaml() or "{}\n"},
        overwrite=overwrite,
    )


def reconstruct_task(
    folder: str | Path,
    task: str,
    out: str | Path | None = None,
    base: str | Path | None = None,
    dtype: str = "same",
    overwrite: bool = False,
    progress: Progress = silent,
) -> StateDict | Path:
    """See `bmm.reconstruct`."""
    if dtype not in DTYPES:
        raise RecipeError(f"no dtype {dtype!r}", f"one of {', '.join(DTYPES)}")
    masked = MaskedModels.load(folder, base)
    stream = masked.stream(task, _dtype(dtype))
    if out is None:
        return dict(stream)
    if Path(out).resolve() == Path(folder).resolve():
        raise WriteError(f"{out} is the folder with the masks", "choose another output folder")

    def counted() -> Iterator[tuple[str, Tensor]]:
        for done, pair in enumerate(stream, 1):
            yield pair
            progress("merge", done, len(masked.base), pair[0])

    like = masked.base
    assert isinstance(like, Checkpoint)
    return write_checkpoint(out, counted(), like=like, dtypes=_dtype(dtype), overwrite=overwrite)


def _dtype(name: str) -> torch.dtype | None:
    return None if name == "same" else getattr(torch, name)
