"""Merge N fine-tuned experts of one model into one, and tune how.

Names load on first use, so that ``import bmm`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import analysis, anchors, grams, rebasin, solver
    from .api import (
        align,
        analyse,
        average,
        calibrate,
        collect_grams,
        evaluate,
        load_study,
        make_recipe,
        merge,
        merge_mergekit,
        reconstruct,
        save,
        tune,
    )
    from .errors import BmmError
    from .evaluation import Task
    from .recipe import Recipe
    from .records import Hyperparameters, Score, StudyResult, Trial
    from .report import pareto_figure

_HOMES = {
    "align": "api", "analyse": "api", "average": "api", "calibrate": "api", "collect_grams": "api",
    "evaluate": "api", "load_study": "api", "make_recipe": "api", "merge": "api", "merge_mergekit": "api",
    "pareto_figure": "report", "reconstruct": "api", "save": "api", "tune": "api",
    "Task": "evaluation", "Recipe": "recipe", "BmmError": "errors",
    "Hyperparameters": "records", "Score": "records", "StudyResult": "records", "Trial": "records",
}  # fmt: skip
_MODULES = {"analysis", "anchors", "grams", "rebasin", "solver", "tasks"}

__all__ = [
    "BmmError", "Hyperparameters", "Recipe", "Score", "StudyResult", "Task", "Trial", "__version__", "align",
    "analyse", "analysis", "anchors", "average", "calibrate", "collect_grams", "evaluate", "grams", "load_study",
    "make_recipe", "merge", "merge_mergekit", "pareto_figure", "rebasin", "reconstruct", "save", "solver", "tasks",
    "tune",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'bmm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
