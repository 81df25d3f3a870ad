"""Functions of the user that a recipe names: FILE.py:NAME or MODULE:NAME."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import BmmError, RecipeError, did_you_mean


def load_function(target: str, key: str) -> Callable[..., Any]:
    """The function that FILE.py:NAME or MODULE:NAME points to. Raises `RecipeError` naming what is missing."""
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise RecipeError(f"{key}: {target!r} names no function", "write FILE.py:FUNCTION or MODULE:FUNCTION")
    try:
        if place.endswith(".py"):
            path = Path(place)
            if not path.is_file():
                raise RecipeError(f"{key}: no file {place}", "paths in a recipe are relative to the recipe's folder")
            spec = importlib.util.spec_from_file_location(f"_bmm_user_{path.stem}", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except RecipeError:
        raise
    except (Exception, SystemExit) as error:
        raise RecipeError(
            f"{key}: {place} cannot be imported: {_said(error)}", "run it alone with python to see why"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        functions = [n for n in dir(module) if callable(getattr(module, n)) and not n.startswith("_")]
        raise RecipeError(f"{key}: {place} has no function {name!r}", did_you_mean(name, functions or ["(none)"]))
    return found


def call_function(target: str, key: str) -> Any:
    """What the function that ``target`` names returns. Raises `RecipeError` as `load_function`, or where it raises."""
    function = load_function(target, key)
    try:
        return function()
    except BmmError:
        raise
    except (Exception, SystemExit) as error:
        raise RecipeError(f"{key}: {target} failed: {_said(error)}", "--debug shows where") from error


def _said(error: BaseException) -> str:
    """An error's type and text on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
