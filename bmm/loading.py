"""From what a user names to what is worked with: the model, its device, the search groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .checkpoint import Checkpoint, ModelPool
from .errors import RecipeError
from .evaluation import Task
from .evaluation.skeleton import from_transformers
from .functions import call_function, load_function
from .groups import AUTO, automatic_groups, coarser_groups, search_groups
from .layouts import matrix_layouts
from .progress import Progress
from .recipe import TASK_FILES, Recipe

ModelBuilder = Callable[[], nn.Module]


def build_model(
    builder: ModelBuilder | None, target: str, folder: str | Path, stored: Iterable[str] = ()
) -> tuple[nn.Module, dict[str, str]]:
    """The model to run tensors in, and its own name of every checkpoint name where these differ.

    Made by ``builder`` where there is one, else by the function ``target`` (FILE.py:FUNCTION) names, or for
    "transformers" from ``folder``'s config.json, whose weights are ``stored`` under these names. Raises `RecipeError`
    where that gives no ``nn.Module``.
    """
    names: dict[str, str] = {}
    if builder is not None:
        model = builder()
    elif target == "transformers":
        model, names = from_transformers(folder, stored)
    else:
        model = call_function(target, "model")
    if not isinstance(model, nn.Module):
        raise RecipeError(f"model returned {type(model).__name__}", "it must return a torch.nn.Module")
    return model, names


def stored_as(folder: Path) -> dict[str, str]:
    """The model's own name of every name in a Hugging Face folder; empty where no model can be built of it."""
    try:
        return from_transformers(folder, outline=True)[1]
    except RecipeError:
        return {}


def open_pool(recipe: Recipe, base: str, experts: Mapping[str, str], progress: Progress) -> ModelPool:
    """Base and experts as the recipe says; what they give reason to say is reported as notices."""
    pool = ModelPool.open(
        base, list(experts.values()), recipe.skip, list(experts), stored_as, recipe.vocabulary, recipe.heads
    )
    for notice in pool.notices:
        progress("notice", 1, 1, notice)
    return pool


def fit_vocabulary(model: nn.Module, pool: ModelPool) -> nn.Module:
    """The model with as many rows of embeddings as a base that ``vocabulary: union`` has extended."""
    config = pool.base.config if isinstance(pool.base, Checkpoint) and pool.base.replaced_files else {}
    text = config.get("text_config")
    rows = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    if rows is None:
        return model
    resize = getattr(model, "resize_token_embeddings", None)
    if not callable(resize):
        raise RecipeError(f"{type(model).__name__} takes in no tokens", "build it of that size, or vocabulary: base")
    resize(rows, mean_resizing=False)
    return model


def find_tasks(target: str, base: str | Path) -> list[Task]:
    """The tasks of a task file, or of a function FILE.py:FUNCTION. Raises `RecipeError` where there are none."""
    if not target.endswith(TASK_FILES):
        found: list[Task] = call_function(target, "tasks")
        return found
    from .tasks.file import load_tasks

    return load_tasks(target, base, load_function)


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
