"""Merges that keep masks: from a recipe to the unified model with its masks, and back to one task's model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from .anchors import MaskedModels, emr_compress, get, resolve_knobs, tall_compress
from .checkpoint import Checkpoint, write_checkpoint
from .errors import RecipeError, WriteError
from .notation import StateDict
from .progress import Progress, silent
from .recipe import Recipe, storage_dtype
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
    if recipe.adapter_rank:
        raise RecipeError("a merge with masks is no adapter", "drop adapter_rank")
    if recipe.heads == "keep" or recipe.vocabulary == "union":
        key = "heads: keep" if recipe.heads == "keep" else "vocabulary: union"
        raise RecipeError(f"{key} does not go with masks", "use base: masks stand on the base as it is stored")
    given = sorted(set(recipe.knobs) - {"mask_strength"})
    if given:
        raise RecipeError(f"{given[0]} has no say in a merge with masks", "drop it: masks stand on the unscaled vector")
    run = Run(recipe, progress=progress, need_tasks=False)
    pool = run.pool
    pool.refuse_expert(out)
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
        dtype=storage_dtype(recipe.dtype),
        max_shard_bytes=int(recipe.shard_gib * 2**30),
        extra_files={"README.md": card, "bmm_recipe.yaml": recipe.to_yaml() or "{}\n"},
        overwrite=overwrite,
    )


def reconstruct(
    folder: str | Path,
    task: str,
    *,
    out: str | Path | None = None,
    base: str | Path | None = None,
    dtype: str = "same",
    overwrite: bool = False,
    progress: Progress = silent,
) -> StateDict | Path:
    """One task's model from a merge that was written with ``masks``.

    Args:
        folder: what ``merge(..., masks=True)`` wrote.
        task: the name of one of its experts.
        out: write a checkpoint there and return its path; otherwise return the tensors.
        base: where the base is now, where it has moved since the merge.
        dtype: of the floating tensors: same (as the base's), float32, bfloat16 or float16.

    Raises:
        CheckpointError: no masks there, or damaged ones, or another base; MergeError: no such task;
        RecipeError: no such dtype; WriteError: see `bmm.errors`.
    """
    kept = storage_dtype(dtype)
    masked = MaskedModels.load(folder, base)
    stream = masked.stream(task, kept)
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
    return write_checkpoint(out, counted(), like=like, dtypes=kept, overwrite=overwrite)
