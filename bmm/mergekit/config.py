"""A mergekit recipe read and checked: which models, which method, and which parameters hold for whom.

What is not supported is refused by its key path (``models[1].parameters.density``), before any file is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RecipeError, did_you_mean
from ..yaml_file import parse_mapping, read_text
from .values import Setting, parse

TOP = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer",
)  # fmt: skip
UNSUPPORTED = {
    "modules": "merge one module at a time, each with a recipe of its own",
    "chat_template": "drop it, and set the template in the merged model's tokenizer_config.json",
    "input_model_parameters": "write the parameters under each of `models`",
}
DTYPES = ("float32", "float16", "bfloat16")
TOKENIZERS = ("base", "union")
FORM = "see docs/mergekit.md for what is read"


@dataclass(frozen=True)
class Level:
    """Parameters of one place in the recipe: its key path, and the settings by name."""

    path: str
    settings: Mapping[str, Setting]


@dataclass(frozen=True)
class Source:
    """One input model: its name in the recipe, that name's key path, and its own levels, the narrowest first."""

    model: str
    path: str
    levels: tuple[Level, ...]


@dataclass(frozen=True)
class MergekitConfig:
    """A recipe as it was written. ``layers``: how many layers its slice says the models have; 0 without slices.

    ``shared``: the levels that hold for every model, the narrowest first. ``tokenizer``: "base" or "union" where the
    recipe asks for one, which is checked against the models' files.
    """

    method: str
    sources: tuple[Source, ...]
    base: str
    shared: tuple[Level, ...]
    layers: int
    dtype: str
    out_dtype: str
    tokenizer: str
    text: str
    where: str

    @classmethod
    def load(cls, path: str | Path) -> MergekitConfig:
        """Read a recipe file; raises `RecipeError` naming the key that is wrong or not supported."""
        return cls.parse(read_text(path), str(path))

    @classmethod
    def parse(cls, text: str, where: str = "mergekit recipe") -> MergekitConfig:
        """The same from a recipe's text; ``where`` names it in errors."""
        raw = parse_mapping(text, where, FORM)
        return _Reader(where).config(raw, text)


class _Reader:
    """Reads the parts of one recipe; every error begins with the file and the key path."""

    def __init__(self, where: str) -> None:
        self.where = where

    def config(self, raw: dict[Any, Any], text: str) -> MergekitConfig:
        for key in raw:
            if key in UNSUPPORTED:
                raise self.error(f"{key}: not supported", UNSUPPORTED[key])
            if key not in TOP:
                raise self.error(f"unknown key {key!r}", did_you_mean(str(key), TOP))
        method = self.text(raw, "merge_method")
        if not method:
            raise self.error("merge_method: missing", "name a method, such as ties")
        if ("models" in raw) == ("slices" in raw):
            raise self.error("models, slices: give one of the two", FORM)
        shared = self.level(raw, "")
        sources, inner, layers = self.models(raw) if "models" in raw else self.slices(raw)
        for number, source in enumerate(sources):
            if source.model in [earlier.model for earlier in sources[:number]]:
                raise self.error(f"{source.path}: {source.model!r} is listed twice", "list every model once")
        return MergekitConfig(
            method,
            sources,
            self.text(raw, "base_model"),
            (*inner, *shared),
            layers,
            self.dtype(raw, "dtype"),
            self.dtype(raw, "out_dtype"),
            self.tokenizer(raw),
            text,
            self.where,
        )

    def models(self, raw: Mapping[Any, Any]) -> tuple[tuple[Source, ...], tuple[Level, ...], int]:
        found = []
        for number, item in enumerate(self.items(raw, "models", "")):
            path = f"models[{number}]"
            self.known(item, path, ("model", "parameters"))
            found.append(Source(self.model(item, path), path, self.level(item, f"{path}.")))
        return tuple(found), (), 0

    def slices(self, raw: Mapping[Any, Any]) -> tuple[tuple[Source, ...], tuple[Level, ...], int]:
        given = self.items(raw, "slices", "")
        if len(given) > 1:
            raise self.error(
                "slices[1]: models assembled from several slices are not supported",
                "one slice over all layers is, and so are gradients over the layers",
            )
        self.known(given[0], "slices[0]", ("sources", "parameters"))
        found, ranges = [], []
        for number, item in enumerate(self.items(given[0], "sources", "slices[0].")):
            path = f"slices[0].sources[{number}]"
            self.known(item, path, ("model", "layer_range", "parameters"))
            ranges.append(self.span(item, path))
            if ranges[-1] != ranges[0]:
                raise self.error(
                    f"{path}.layer_range: {ranges[-1]}, and {ranges[0]} in sources[0]", "take the same layers of each"
                )
            found.append(Source(self.model(item, path), path, self.level(item, f"{path}.")))
        return tuple(found), self.level(given[0], "slices[0]."), ranges[0][1]

    def span(self, item: Mapping[Any, Any], path: str) -> list[int]:
        value = item.get("layer_range")
        if not isinstance(value, list) or len(value) != 2 or not all(type(x) is int for x in value):
            raise self.error(f"{path}.layer_range: {value!r} is no [first, last + 1]", "give [0, number of layers]")
        if value[0] != 0 or value[1] < 1:
            raise self.error(f"{path}.layer_range: {value} is not all layers", "give [0, number of layers]")
        return value

    def model(self, item: Mapping[Any, Any], path: str) -> str:
        name = item.get("model")
        if not isinstance(name, str) or not name:
            raise self.error(f"{path}.model: {name!r} is no name of a model", "give a folder, or a name for --expert")
        if "+" in name and not Path(name).expanduser().exists():
            raise self.error(
                f"{path}.model: {name!r} adds an adapter", "give the adapter's folder as a model of its own"
            )
        return name

    def level(self, item: Mapping[Any, Any], prefix: str) -> tuple[Level, ...]:
        raw = item.get("parameters")
        if raw is None:
            return ()
        path = f"{prefix}parameters"
        if not isinstance(raw, Mapping):
            raise self.error(f"{path}: {raw!r} is no mapping", "write NAME: VALUE")
        settings = {str(key): parse(value, f"{self.where}: {path}.{key}") for key, value in raw.items()}
        return (Level(path, settings),)

    def tokenizer(self, raw: Mapping[Any, Any]) -> str:
        given, key = raw.get("tokenizer_source"), "tokenizer_source"
        nested = raw.get("tokenizer")
        if nested is not None:
            if given is not None:
                raise self.error("tokenizer, tokenizer_source: give one of the two", FORM)
            if not isinstance(nested, Mapping):
                raise self.error(f"tokenizer: {nested!r} is no mapping", "write tokenizer: {source: base}")
            for other, value in nested.items():
                if other != "source" and value:
                    raise self.error(f"tokenizer.{other}: not supported", "source alone is")
            given, key = nested.get("source", "union"), "tokenizer.source"
        if given is None:
            return ""
        if given not in TOKENIZERS:
            raise self.error(f"{key}: {given!r} is not supported", f"{' and '.join(TOKENIZERS)} are")
        return str(given)

    def dtype(self, raw: Mapping[Any, Any], key: str) -> str:
        name = self.text(raw, key).removeprefix("torch.")
        if name and name not in DTYPES:
            raise self.error(f"{key}: {name!r} is not supported", did_you_mean(name, DTYPES))
        return name

    def text(self, raw: Mapping[Any, Any], key: str) -> str:
        value = raw.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(f"{key}: {value!r} is no text", FORM)
        return value or ""

    def items(self, raw: Mapping[Any, Any], key: str, prefix: str) -> list[Mapping[Any, Any]]:
        value = raw.get(key)
        if not isinstance(value, list) or not value:
            raise self.error(f"{prefix}{key}: a list is expected", FORM)
        for number, item in enumerate(value):
            if not isinstance(item, Mapping):
                raise self.error(f"{prefix}{key}[{number}]: a mapping is expected", FORM)
        return value

    def known(self, item: Mapping[Any, Any], path: str, keys: tuple[str, ...]) -> None:
        for key in item:
            if key not in keys:
                raise self.error(f"{path}.{key}: unknown key", did_you_mean(str(key), keys))

    def error(self, message: str, hint: str) -> RecipeError:
        return RecipeError(f"{self.where}: {message}", hint)
