"""Flags from the recipe: every key of `bmm.recipe.Recipe` is a flag of the same name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

import click
import yaml

from bmm.errors import RecipeError
from bmm.recipe import Recipe
from bmm.records import RENAMED
from bmm.yaml_file import by_name

INPUT = ("zoo", "base", "experts", "model", "tasks", "skip", "vocabulary", "heads")
RUNTIME = ("device", "autocast", "max_memory", "cache")
GRAMS = ("calibration", "batch_size", "inputs", "norms")
ANCHOR = ("anchor", "knobs", "fisher")
BMM = ("grams", "gamma", "normalise", "bias", "weights", "groups", "bands", "group")
OUTPUT = ("dtype", "shard_gib", "adapter_rank")
SEARCH = (
    "log10_lam", "rho", "search", "score_by", "goal", "floor", "objectives", "budget", "engine", "early_stopping",
    "refine", "choice", "holdout", "finalists", "workers", "executor", "seed", "out",
)  # fmt: skip


def _default(key: Field[Any]) -> Any:
    return key.default_factory() if key.default_factory is not MISSING else key.default


def _option(key: Field[Any]) -> Callable[[Any], Any]:
    flag = "--" + key.name.replace("_", "-")
    names = [flag, key.name]
    if key.name == "experts":
        names.insert(1, "--expert")
    if key.name == "knobs":
        names.insert(1, "--knob")
    if key.name == "out":
        names.insert(1, "-o")
    meta, default = key.metadata, _default(key)
    text = str(meta["help"])
    if default not in ("", (), {}):
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text += f"  [default: {shown}]"
    if meta.get("many") and "choices" in meta:
        return click.option(*names, multiple=True, type=click.Choice(meta["choices"]), help=text + " Repeatable.")
    if meta.get("mapping") or meta.get("many"):
        metavar = "NAME=VALUE" if meta.get("mapping") else "NAMES" if "separator" in meta else "PATTERN"
        metavar = "[TASK=]SHARE" if "bare" in meta else metavar
        return click.option(*names, multiple=True, metavar=metavar, help=text + " Repeatable.")
    if meta.get("pair"):
        return click.option(*names, type=(float, float), default=None, metavar="LOW HIGH", help=text)
    if "choices" in meta:
        return click.option(*names, type=click.Choice(meta["choices"]), default=None, help=text)
    if key.type == "bool":
        return click.option(f"{flag}/--no-{flag[2:]}", key.name, default=None, help=str(meta["help"]))
    kinds: dict[str, Any] = {"int": int, "float": float}
    return click.option(*names, type=kinds.get(str(key.type), str), default=None, help=text)


def _gone(old: str, new: str) -> Callable[[Any], Any]:
    """The flag that a key had before it was renamed: hidden, and refused with the one it has now."""

    def refuse(context: click.Context, option: click.Parameter, value: str | None) -> None:
        if value is not None:
            raise click.UsageError(f"--{old} is --{new.replace('_', '-')} now", context)

    return click.option(f"--{old}", hidden=True, expose_value=False, callback=refuse)


def recipe_options(*names: str) -> Callable[[Any], Any]:
    """Add ``--recipe`` and a flag for each named recipe key."""
    recipe = click.option("--recipe", type=click.Path(dir_okay=False), help="YAML recipe; flags win over its keys.")
    return lambda function: recipe(key_options(*names)(function))


def key_options(*names: str) -> Callable[[Any], Any]:
    """Add a flag for each named recipe key."""
    by_name = {f.name: f for f in fields(Recipe)}

    def decorate(function: Any) -> Any:
        for name in reversed(names):
            function = _option(by_name[name])(function)
        for old, new in RENAMED.items():
            function = _gone(old, new)(function) if new in names else function
        return function

    return decorate


def common(function: Any) -> Any:
    """--json, --quiet and --debug."""
    for option in (
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
        click.option("--quiet", "-q", is_flag=True, help="No progress, only the result."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ):
        function = option(function)
    return function


def collected(values: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given, as recipe keys. Raises `RecipeError` for a malformed NAME=VALUE."""
    metadata = {f.name: f.metadata for f in fields(Recipe)}
    out: dict[str, Any] = {}
    for name, value in values.items():
        if name not in metadata or value is None or value == ():
            continue
        if metadata[name].get("mapping"):
            pairs = (_pair(name, item, metadata[name].get("bare")) for item in value)
            out[name] = by_name(f"--{name.replace('_', '-')}", pairs)
        else:
            out[name] = list(value) if metadata[name].get("many") else value
    return out


def _pair(flag: str, text: str, bare: str | None = None) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if bare and not equals:
        return bare, text
    if flag == "experts" and not equals:
        # A bare folder is named after itself.
        return text.rstrip("/").rsplit("/", 1)[-1].removesuffix(".safetensors"), text
    if not equals or not name:
        raise RecipeError(f"--{flag.replace('_', '-')}: {text!r} is not NAME=VALUE", "for example scale=0.5")
    return name, yaml.safe_load(value) if flag in ("knobs", "weights") else value


def load_recipe(path: str | None, values: Mapping[str, Any]) -> Recipe:
    """The recipe of ``--recipe`` with the given flags on top."""
    keys = collected(values)
    return Recipe.load(path, **keys) if path else Recipe.from_dict(keys, "options")
