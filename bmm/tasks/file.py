"""Task files: tasks in YAML or JSON, everything in them checked before the first trial.

A file maps the name of each task to its ``kind`` and that kind's keys, which are the keyword arguments of the builders.
Errors name the file, the line and the key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import BmmError, RecipeError, did_you_mean
from ..evaluation import Task
from .build import Splits
from .function import function_task
from .generation import exact_match
from .harness import harness_task
from .heads import TEMPLATES, load_head, zero_shot
from .images import image_classification
from .likelihood import multiple_choice, perplexity
from .text import text_classification

LoadFunction = Callable[[str, str], Callable[..., Any]]

_SPLITS = {"train": "path", "validation": "path", "test": "path", "limit": "counts", "seed": "count"}
_HEAD = {"head": "path", "head_names": "texts", "classes": "texts", "labels": "count"}
_WORDS = {"tokenizer": "path", "template": "text", "max_tokens": "count", "batch_size": "count"}

KINDS: dict[str, dict[str, str]] = {
    "image_classification": {
        **_SPLITS, **_HEAD, "zero_shot": "mapping", "processor": "path", "image_size": "count", "mean": "numbers",
        "std": "numbers", "columns": "columns", "batch_size": "count",
    },
    "text_classification": {
        **_SPLITS, **_HEAD, "pooling": "text", "columns": "columns", "tokenizer": "path", "max_tokens": "count",
        "batch_size": "count",
    },
    "multiple_choice": {
        **_SPLITS, **_WORDS, "options": "texts", "option_template": "text", "normalise": "yes or no",
        "columns": "columns",
    },
    "perplexity": {**_SPLITS, **_WORDS},
    "exact_match": {**_SPLITS, **_WORDS, "answer": "text", "pattern": "text", "max_new_tokens": "count"},
    "function": {"validation": "function", "test": "function"},
    "lm_eval": {
        "tasks": "texts", "validation": "span", "test": "span", "metric": "text", "shots": "number",
        "tokenizer": "path", "batch_size": "count", "include": "path",
    },
}  # fmt: skip
"""The keys of every kind, and what each of them holds."""

_COLUMNS = {
    "image_classification": ("image", "label"),
    "text_classification": ("text", "pair", "label"),
    "multiple_choice": ("options", "answer"),
}
_ZERO_SHOT = {"templates": "texts", "text": "path"}
_NEEDED = {"lm_eval": "tasks"}


@dataclass(frozen=True)
class _Where:
    """A place in the file, for errors: the line of each key by its path."""

    file: Path
    lines: Mapping[tuple[str, ...], int]

    def fail(self, keys: tuple[str, ...], message: str, hint: str) -> RecipeError:
        line = next((self.lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.lines), 1)
        return RecipeError(f"{self.file}, line {line}: {': '.join(keys)}: {message}", hint)


def load_tasks(path: str | Path, base: str | Path, load_function: LoadFunction) -> list[Task]:
    """The tasks of a file.

    Args:
        path: the file; paths in it are relative to its folder.
        base: the base checkpoint, which brings tokenizer, image processor and text tower where the file names none.
        load_function: finds FILE.py:FUNCTION.

    Raises:
        RecipeError: file, line and key of the first thing that is wrong: unknown keys and kinds, values that do not
            fit, files that are missing or empty, columns that are not there, labels outside the classes.
    """
    file = Path(path)
    raw, where = _read(file)
    tasks = []
    for name, entry in raw.items():
        keys = _checked(name, entry, where)
        kind = keys.pop("kind")
        _resolve(keys, KINDS[kind], file.parent)
        try:
            tasks.append(_build(name, kind, keys, Path(base), load_function))
        except BmmError as error:
            raise where.fail((name, _blamed(error.message, keys)), error.message, error.hint) from error
    return tasks


def _blamed(message: str, keys: Mapping[str, Any]) -> str:
    """The key that an error is about: that of the split it names, or whose value it shows."""
    for split in ("train", "validation", "test"):
        if f", {split}: " in message:
            return split
    for key, value in keys.items():
        if message.startswith(f"{key}:") or (
            isinstance(value, str | Path) and len(str(value)) > 3 and str(value) in message
        ):
            return key
    return "kind"


def _read(file: Path) -> tuple[dict[str, Any], _Where]:
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"tasks: cannot read {file}: {error}", "paths in a recipe are relative to its folder"
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{file} is not YAML: {' '.join(str(error).split())}", "see docs/tasks.md") from error
    lines: dict[tuple[str, ...], int] = {}
    if twice := _note_lines(node, (), lines):
        raise RecipeError(f"{file}, {twice}", "keep one of them")
    where = _Where(file, lines)
    if not isinstance(raw, dict) or not raw:
        raise RecipeError(f"{file}: a task file maps names of tasks to their keys", "see docs/tasks.md")
    return {str(k): v for k, v in raw.items()}, where


def _note_lines(node: Any, path: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> str:
    """Write down the line of every key; says which key is there twice, if any."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            if here in lines:
                return f"line {key.start_mark.line + 1}: {': '.join(here)} is there twice"
            lines[here] = key.start_mark.line + 1
            if twice := _note_lines(value, here, lines):
                return twice
    return ""


def _checked(name: str, entry: Any, where: _Where) -> dict[str, Any]:
    """The keys of a task, each of its type."""
    if not isinstance(entry, dict):
        raise where.fail((name,), f"{type(entry).__name__}, not a mapping", "give kind, validation, ...")
    kind = entry.get("kind")
    if kind not in KINDS:
        raise where.fail((name, "kind"), f"no kind {kind!r}", did_you_mean(str(kind), KINDS))
    known = KINDS[kind] | {"kind": "text"}
    for key, value in entry.items():
        if key not in known:
            raise where.fail((name, str(key)), f"unknown key for {kind}", did_you_mean(str(key), known))
        if not _FITS[known[key]](value):
            raise where.fail((name, key), f"{value!r} does not fit", f"it takes {_WANTED[known[key]]}")
    for key, allowed in (("columns", _COLUMNS.get(kind, ())), ("limit", ("train", "validation", "test")),
                         ("zero_shot", _ZERO_SHOT)):  # fmt: skip
        for inner, value in (entry.get(key) or {}).items():
            if inner not in allowed:
                raise where.fail((name, key, str(inner)), "unknown key", did_you_mean(str(inner), allowed))
            if key == "zero_shot" and not _FITS[_ZERO_SHOT[inner]](value):
                raise where.fail(
                    (name, key, inner), f"{value!r} does not fit", f"it takes {_WANTED[_ZERO_SHOT[inner]]}"
                )
    needed = _NEEDED.get(kind, "validation")
    if needed not in entry:
        raise where.fail((name,), f"{kind} needs {needed}", "see docs/tasks.md")
    if "head" in entry and "zero_shot" in entry:
        raise where.fail((name, "zero_shot"), "head and zero_shot exclude each other", "drop one of the two")
    return dict(entry)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


_FITS: dict[str, Callable[[Any], bool]] = {
    "path": lambda v: isinstance(v, str) and bool(v),
    "function": lambda v: isinstance(v, str) and ":" in v,
    "text": lambda v: isinstance(v, str),
    "texts": _is_texts,
    "count": lambda v: _is_count(v) or v == 0,
    "counts": lambda v: isinstance(v, dict) and all(map(_is_count, v.values())),
    "number": lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0,
    "numbers": lambda v: isinstance(v, list) and len(v) == 3 and all(isinstance(x, int | float) for x in v),
    "columns": lambda v: isinstance(v, dict) and all(isinstance(x, str) for x in v.values()),
    "mapping": lambda v: isinstance(v, dict),
    "yes or no": lambda v: isinstance(v, bool),
    "span": lambda v: isinstance(v, list) and len(v) == 2 and all(isinstance(x, int) for x in v) and 0 <= v[0] < v[1],
}
_WANTED = {
    "path": "a path", "function": "FILE.py:FUNCTION", "text": "text", "texts": "a list of texts",
    "count": "a whole number", "counts": "a number for each of train, validation, test", "number": "a whole number",
    "numbers": "three numbers", "columns": "a column's name for each", "mapping": "a mapping (it may be empty: {})",
    "yes or no": "true or false", "span": "[first, last] with first < last",
}  # fmt: skip


def _resolve(keys: dict[str, Any], kinds: Mapping[str, str], folder: Path) -> None:
    """Paths relative to the file become paths."""
    for key, value in keys.items():
        if kinds[key] == "path":
            keys[key] = str(folder / Path(value).expanduser())
        elif kinds[key] == "function" and value.partition(":")[0].endswith(".py"):
            keys[key] = str(folder / value)
    if isinstance(shot := keys.get("zero_shot"), dict) and "text" in shot:
        keys["zero_shot"] = shot | {"text": str(folder / Path(shot["text"]).expanduser())}


def _build(name: str, kind: str, keys: dict[str, Any], base: Path, load_function: LoadFunction) -> Task:
    if kind == "function":
        return function_task(name, *(load_function(keys[k], k) for k in ("validation", "test") if k in keys))
    if kind == "lm_eval":
        spans: dict[str, Any] = {k: tuple(keys.pop(k)) for k in ("validation", "test") if k in keys}
        return harness_task(name, keys.pop("tasks"), keys.pop("tokenizer", base), **keys, **spans)
    splits = Splits(**{k: keys.pop(k) for k in _SPLITS if k in keys})
    if kind == "image_classification":
        return image_classification(name, splits, **_with_head(keys, base))
    keys.setdefault("tokenizer", base)
    if kind == "text_classification":
        return text_classification(name, splits, **_with_head(keys, base))
    if kind == "perplexity":
        if _is_seq2seq(base):
            raise RecipeError("perplexity is of a decoder alone, and the base has an encoder", "use multiple_choice")
        return perplexity(name, splits, **keys)
    build = multiple_choice if kind == "multiple_choice" else exact_match
    return build(name, splits, seq2seq=_is_seq2seq(base), **keys)


def _with_head(keys: dict[str, Any], base: Path) -> dict[str, Any]:
    """The keys with the head they speak of, and where the base has one its image processor."""
    names, shot = keys.pop("head_names", ()), keys.pop("zero_shot", None)
    if "head" in keys:
        keys["head"] = load_head(keys["head"], names)
    elif shot is not None:
        keys["head"] = zero_shot(shot.get("text", base), keys.get("classes") or (), shot.get("templates", TEMPLATES))
    if "tokenizer" not in keys and not keys.get("image_size") and (base / "preprocessor_config.json").is_file():
        keys.setdefault("processor", base)
    return keys


def _is_seq2seq(base: Path) -> bool:
    try:
        config = yaml.safe_load((base / "config.json").read_text())
    except (OSError, yaml.YAMLError):
        return False
    return isinstance(config, dict) and config.get("is_encoder_decoder") is True
