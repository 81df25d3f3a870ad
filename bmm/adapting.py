"""A merged model written as an adapter on its base: from a run to `bmm.checkpoint.adapter_writer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .checkpoint.adapter_writer import Site, write_adapter
from .errors import RecipeError, WriteError
from .evaluation.skeleton import from_transformers
from .loading import build_model
from .recipe import storage_dtype
from .run import Run

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SECTION = "## Adapter\n\n{truncation}\n\nScores above are of the merge before it was truncated.\n"


def write_low_rank(
    run: Run,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    folder: Path,
    texts: Mapping[str, str],
    *,
    overwrite: bool,
) -> Path:
    """Write merged tensors as an adapter of the recipe's ``adapter_rank``; errors as `write_adapter`."""
    base = run.pool.base
    if not isinstance(base, Checkpoint):
        raise WriteError("an adapter needs a base on disk", "write a full model")
    if base.replaced_files:
        raise WriteError("the merge takes in tokens, and an adapter adds no rows", "vocabulary: base, or a full model")
    write_adapter(
        folder,
        tensors.items() if isinstance(tensors, Mapping) else tensors,
        base=base,
        sites=sites(run, base),
        rank=run.recipe.adapter_rank,
        dtype=storage_dtype(run.recipe.dtype) or torch.float32,
        overwrite=overwrite,
        extra_files={**texts, "README.md": f"{texts['README.md'].rstrip()}\n\n{SECTION}"},
    )
    return folder


def sites(run: Run, base: Checkpoint) -> dict[str, Site]:
    """Where each of the base's parameters stands in the model, from its modules; by their names where none is built."""
    try:
        model, names = _model(run, base)
    except RecipeError:
        return {name: _guess(base, name) for name in base.names}
    own = {name: names.get(name, name) for name in base.names}
    found: dict[str, Site] = {}
    attention = [f"{n}." for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    for prefix, module in model.named_modules():
        kind = _kind(module) if not any(f"{prefix}.".startswith(a) for a in attention) else ""
        for leaf, _ in module.named_parameters(recurse=False):
            found[f"{prefix}.{leaf}" if prefix else leaf] = Site(prefix, leaf, kind)
    return {name: found.get(own[name], replace(_guess(base, name), kind="")) for name in base.names}


def _model(run: Run, base: Checkpoint) -> tuple[nn.Module, dict[str, str]]:
    if run.builder is None and run.recipe.model == "transformers":
        return from_transformers(base.path, outline=True)
    return build_model(run.builder, run.recipe.model, run.recipe.base)


def _kind(module: nn.Module) -> str:
    """What an adapter can make of a module; "" for one whose parameters lie beside other modules."""
    if type(module).__name__ == "Conv1D":
        return "conv1d"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, CONVOLUTIONS):
        return "conv" if module.groups == 1 else "whole"
    return "whole" if next(module.children(), None) is None else ""


def _guess(base: Checkpoint, name: str) -> Site:
    module, _, leaf = name.rpartition(".")
    dims = len(base.info(name).shape)
    last = module.rpartition(".")[2].lower()
    if leaf == "weight" and dims == 2:
        return Site(module, leaf, "embedding" if "embed" in last or last in ("wte", "wpe", "shared") else "linear")
    if leaf == "weight" and dims > 2:
        return Site(module, leaf, "conv")
    return Site(module, leaf, "whole" if module else "")
