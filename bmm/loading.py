"""From what a user names to what is worked with: the model, its device, the search groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .checkpoint import ModelPool
from .errors import RecipeError
from .evaluation.skeleton import from_transformers
from .groups import AUTO, automatic_groups, coarser_groups, search_groups
from .merging import matrix_layouts
from .recipe import Recipe, load_function

ModelBuilder = Callable[[], nn.Module]


def build_model(builder: ModelBuilder | None, target: str, folder: str | Path) -> tuple[nn.Module, dict[str, str]]:
    """The model to run tensors in, and its own name of every checkpoint name where these differ.

    Made by ``builder`` where there is one, else by the function ``target`` (FILE.py:FUNCTION) names, or for
    "transformers" from ``folder``'s config.json. Raises `RecipeError` where that gives no ``nn.Module``.
    """
    names: dict[str, str] = {}
    if builder is not None:
        model = builder()
    elif target == "transformers":
        model, names = from_transformers(folder)
    else:
        model = load_function(target, "model")()
    if not isinstance(model, nn.Module):
        raise RecipeError(f"model returned {type(model).__name__}", "it must return a torch.nn.Module")
    return model, names


def find_device(name: str) -> torch.device:
    """The device of that name; raises `RecipeError` where there is none."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"no device {name!r}", "cpu, cuda, cuda:1, mps ...") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"device {name}: this torch sees no CUDA device", "use device: cpu, or a CUDA build of torch")
    return device


def with_groups(recipe: Recipe, pool: ModelPool) -> Recipe:
    """The recipe with ``groups: auto`` settled for good: a study whose budget grows keeps its groups."""
    if recipe.groups == AUTO:
        scheme, bands = automatic_groups(matrix_layouts(pool, None), recipe.budget // 3, recipe.group)
        recipe = replace(recipe, groups=scheme, bands=bands)
    if recipe.refine:  # refuse it now where there is nothing to refine
        found = search_groups(matrix_layouts(pool, None), recipe.groups, recipe.bands, recipe.group)
        coarser_groups(found, recipe.groups, recipe.group)
    return recipe
