"""From what a caller gives to a `Run`: live objects or FILE.py:FUNCTION, and the run that an earlier study was."""

from __future__ import annotations

from typing import Any

from .errors import StudyError
from .progress import Progress
from .recipe import Recipe
from .run import Run
from .search.database import StudyDatabase


def targets(tasks: Any, model: Any) -> dict[str, str]:
    """The recipe keys of what is named (FILE.py:FUNCTION) instead of given as an object."""
    return {k: v for k, v in (("tasks", tasks), ("model", model)) if isinstance(v, str)}


def open_run(
    recipe: Recipe, tasks: Any, model: Any, progress: Progress, need_tasks: bool = True, check: bool = True
) -> Run:
    """The run of ``recipe``; ``tasks`` and ``model`` enter where they are objects, names are in the recipe."""
    return Run(
        recipe,
        tasks=None if isinstance(tasks, str) else tasks,
        model=None if isinstance(model, str) else model,
        progress=progress,
        need_tasks=need_tasks,
        check=check,
    )


def require_same_inputs(database: StudyDatabase, inputs: str, hint: str = "put the original ones back") -> None:
    """Raises `StudyError` where the checkpoints' fingerprint, ``inputs``, is not the one the study began with."""
    if database.meta().get("inputs") != inputs:
        raise StudyError(f"the checkpoints have changed since the study in {database.path.parent} began", hint)
