"""A parameter's value in a mergekit recipe: one number, a gradient over the layers, or values by tensor name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError

Scalar = float | bool


@dataclass(frozen=True)
class Gradient:
    """Values at equal steps from the first layer to the last; numbers are interpolated, truth values are not."""

    values: tuple[Scalar, ...]

    def at(self, depth: float) -> Scalar:
        """The value at ``depth``, 0 (the first layer, and whatever is outside the layers) to 1 (the last)."""
        place = depth * (len(self.values) - 1)
        low = min(int(place), len(self.values) - 1)
        high = min(low + 1, len(self.values) - 1)
        first, second = self.values[low], self.values[high]
        if isinstance(first, bool) or isinstance(second, bool):
            return first
        return first + (place - low) * (second - first)


@dataclass(frozen=True)
class Filtered:
    """Values by tensor name, the first that fits: each pair is a part of the name ("" fits all), and its value."""

    cases: tuple[tuple[str, Scalar | Gradient], ...]


Setting = Scalar | Gradient | Filtered


def parse(raw: Any, where: str) -> Setting:
    """The setting written as ``raw``; `RecipeError` naming ``where`` for anything else."""
    if isinstance(raw, list) and raw and all(isinstance(item, Mapping) for item in raw):
        return Filtered(tuple(_case(item, f"{where}[{number}]") for number, item in enumerate(raw)))
    return _plain(raw, where)


def evaluate(setting: Setting, name: str, depth: float) -> Scalar | None:
    """The value for one tensor; None where no filter fits its name."""
    if isinstance(setting, Filtered):
        fitting = [value for part, value in setting.cases if part in name]
        if not fitting:
            return None
        setting = fitting[0]
    return setting.at(depth) if isinstance(setting, Gradient) else setting


def _case(item: Mapping[Any, Any], where: str) -> tuple[str, Scalar | Gradient]:
    unknown = sorted(str(key) for key in item if key not in ("filter", "value"))
    if unknown or "value" not in item:
        raise RecipeError(
            f"{where}: {f'unknown key {unknown[0]!r}' if unknown else 'no value'}",
            "write {filter: PART, value: NUMBER}",
        )
    part = item.get("filter")
    if part is not None and not isinstance(part, str):
        raise RecipeError(f"{where}.filter: {part!r} is no text", "a filter is part of a tensor's name")
    return "" if part in (None, "*") else part, _plain(item["value"], f"{where}.value")


def _plain(raw: Any, where: str) -> Scalar | Gradient:
    if isinstance(raw, Sequence) and not isinstance(raw, str):
        if not raw:
            raise RecipeError(f"{where}: an empty list", "give a number, or numbers from the first layer to the last")
        values = tuple(_scalar(item, f"{where}[{number}]") for number, item in enumerate(raw))
        if len({isinstance(value, bool) for value in values}) > 1:
            raise RecipeError(f"{where}: numbers and truth values in one list", "give one kind")
        return Gradient(values)
    return _scalar(raw, where)


def _scalar(raw: Any, where: str) -> Scalar:
    if isinstance(raw, bool):
        return raw
    try:
        if not isinstance(raw, int | float | str):  # text, because YAML 1.1 takes 1e-5 for one
            raise ValueError
        value = float(raw)
    except (ValueError, OverflowError):
        raise RecipeError(
            f"{where}: {raw!r} is no number", "give a number, a list of numbers, or a list of {filter, value}"
        ) from None
    if not math.isfinite(value):
        raise RecipeError(f"{where}: {raw!r} is not finite", "give a finite number")
    return value
