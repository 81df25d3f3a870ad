"""Small YAML files that users write, or were sent: read whole, or refused with a reason."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from .errors import RecipeError

MAX_BYTES = 1 << 20
"""Nobody writes a larger recipe; parsing takes a second for every hundred kilobytes."""

MAX_DEPTH, MAX_ITEMS = 100, 100_000


def by_name(what: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of ``what`` by name. Raises `RecipeError` for a name that is there twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            kind = "PATH" if "expert" in what else "VALUE"
            raise RecipeError(
                f"{what} {name!r} is given twice, {found[name]} and {value}", f"each name once: NAME={kind}"
            )
        found[name] = value
    return found


def read_text(path: str | Path) -> str:
    """The UTF-8 text of a small file. Raises `RecipeError`."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError(f"cannot read recipe {path}: {reason}", "check the path") from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path} has more than {MAX_BYTES >> 20} MiB", "give a recipe, not a model")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is no UTF-8 text", "save it as UTF-8") from None


def parse_mapping(text: str, where: str, hint: str) -> dict[Any, Any]:
    """The mapping that is the one document of a YAML text; raises `RecipeError` with ``hint`` for anything else.

    Nesting, and what aliases expand to, are limited: neither may take more than a moment.
    """
    try:
        if max(accumulate((c in "[{") - (c in "]}") for c in text), default=0) > MAX_DEPTH:
            raise ValueError("nested too deeply")
        raw = yaml.load(text, _Loader)
        if _items(raw, {}) > MAX_ITEMS:
            raise ValueError("its aliases expand to too much")
    except (yaml.YAMLError, ValueError, OverflowError, AttributeError, TypeError, KeyError) as error:  # odd scalars too
        raise RecipeError(f"{where} is not YAML: {' '.join(str(error).split())[:300]}", hint) from None
    except RecursionError:
        raise RecipeError(f"{where} is not YAML: nested too deeply", hint) from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys to values", hint)
    return raw


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, where others take the last: one of two experts would be gone."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _items(value: Any, known: dict[int, int]) -> int:
    """How many values there are with every alias written out; `ValueError` for text that is none."""
    if isinstance(value, str):
        value.encode("utf-8")  # an escaped half of a surrogate pair has no place in a path
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) not in known:
        parts = [*value, *value.values()] if isinstance(value, dict) else list(value)
        known[id(value)] = MAX_ITEMS  # of a value inside itself
        known[id(value)] = 1 + sum(_items(part, known) for part in parts)
    return known[id(value)]
