"""Rows of data from what lies on disk: JSONL, CSV, parquet, .npz, a `datasets` folder, or images in class folders.

Everything is checked as it is read: what is wrong is named by file, line or row, and column.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import RecipeError, did_you_mean

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMS = ".jsonl, .csv, .parquet, .npz, a folder saved by `datasets`, or a folder of class folders with images"


@dataclass(frozen=True)
class Rows:
    """Rows of one split, read one at a time.

    ``name_of`` says how a row is called in errors: line 1 of a JSONL, row 0 of a parquet file, an image's path.
    """

    path: Path
    columns: tuple[str, ...]
    read: Callable[[int], dict[str, Any]]
    count: int
    name_of: Callable[[int], str]
    classes: tuple[str, ...] | None = None
    """The names of the labels where the data bring them: class folders, and ClassLabel columns of `datasets`."""

    def __len__(self) -> int:
        return self.count

    def where(self, number: int) -> str:
        """The place of a row, for errors."""
        return f"{self.path}, {self.name_of(number)}"

    def require(self, columns: Sequence[str]) -> None:
        """Raise `RecipeError` for a column that is not there."""
        for column in columns:
            if column not in self.columns:
                raise RecipeError(
                    f"{self.path} has no column {column!r}",
                    f"columns: {', '.join(self.columns)}; name another with columns: {{...}}",
                )

    def iterate(self, order: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of these numbers, with their numbers."""
        for number in order:
            yield number, self.read(number)


def open_rows(path: str | Path) -> Rows:
    """The rows of a file or folder. Raises `RecipeError` where it is missing, empty, damaged or of no known form."""
    path = Path(path).expanduser().absolute()
    if not path.exists():
        raise RecipeError(f"no data at {path}", "paths in a task file are relative to its folder")
    if path.is_dir():
        rows = _dataset(path) if (path / "state.json").is_file() else _image_folder(path)
    else:
        readers = {
            ".jsonl": _jsonl,
            ".ndjson": _jsonl,
            ".csv": _csv,
            ".parquet": _parquet,
            ".npz": _npz,
        }
        if path.suffix not in readers:
            raise RecipeError(f"{path}: data of no known form", f"give {FORMS}")
        rows = readers[path.suffix](path)
    if len(rows) == 0:
        raise RecipeError(f"{path} is empty", "give at least one row")
    return rows


def drawn(count: int, limit: int | None, seed: int = 0) -> list[int]:
    """``limit`` of ``count`` row numbers, drawn without replacement and in random order; the same ones every time."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order if limit is None else order[:limit]


def _jsonl(path: Path) -> Rows:
    found: list[tuple[int, dict[str, Any]]] = []
    with _opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise RecipeError(f"{path}, line {number}: not JSON: {error.msg}", "one JSON object a line") from error
            if not isinstance(row, dict):
                raise RecipeError(
                    f"{path}, line {number}: {type(row).__name__}, not an object", "one JSON object a line"
                )
            found.append((number, row))
    columns = dict.fromkeys(key for _, row in found for key in row)
    return Rows(path, tuple(columns), lambda n: found[n][1], len(found), lambda n: f"line {found[n][0]}")


def _csv(path: Path) -> Rows:
    with _opened(path, newline="") as lines:
        reader = csv.DictReader(lines)
        rows = list(reader)
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise RecipeError(f"{path}, line {number}: not as many fields as columns", "quote fields that hold commas")
    return Rows(path, tuple(reader.fieldnames or ()), lambda n: rows[n], len(rows), lambda n: f"line {n + 2}")


def _opened(path: Path, newline: str | None = None) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {path}: {error}", "a text file in UTF-8") from error
    import io

    return io.StringIO(text, newline=newline)


def _parquet(path: Path) -> Rows:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise RecipeError(f"{path}: reading parquet needs pyarrow", "pip install 'bmm-tuner[data]'") from error
    try:
        table = read_table(path)
    except (OSError, ArrowException) as error:
        raise RecipeError(f"{path} is no parquet file: {error}", "write it again") from error
    return Rows(path, tuple(table.column_names), lambda n: _one(table, n), table.num_rows, lambda n: f"row {n}")


def _one(table: Any, number: int) -> dict[str, Any]:
    return {name: table.column(name)[number].as_py() for name in table.column_names}


def _npz(path: Path) -> Rows:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise RecipeError(f"{path} is no readable .npz: {error}", "numpy.savez(path, image=..., label=...)") from error
    sizes = {name: len(array) if array.ndim else -1 for name, array in arrays.items()}
    if len(set(sizes.values())) > 1 or -1 in sizes.values():
        raise RecipeError(f"{path}: arrays of unlike length {sizes}", "one row an input in every array")
    count = next(iter(sizes.values()), 0)
    return Rows(path, tuple(arrays), lambda n: {k: a[n] for k, a in arrays.items()}, count, lambda n: f"row {n}")


def _dataset(path: Path) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise RecipeError(
            f"{path}: reading a `datasets` folder needs datasets", "pip install 'bmm-tuner[data]'"
        ) from error
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:
        raise RecipeError(f"{path}: datasets cannot load it: {error}", "save it again with save_to_disk") from error
    features = found.features
    named = [f.names for f in features.values() if isinstance(f, datasets.ClassLabel)]
    classes = tuple(named[0]) if len(named) == 1 else None
    return Rows(path, tuple(found.column_names), lambda n: dict(found[n]), len(found), lambda n: f"row {n}", classes)


def _image_folder(path: Path) -> Rows:
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text()).get("splits", [])
        raise RecipeError(
            f"{path} holds the splits {', '.join(splits)}", f"give one of them: {path / (splits or ['train'])[0]}"
        )
    classes = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [
        (file, name) for name in classes for file in sorted((path / name).rglob("*")) if file.suffix.lower() in IMAGES
    ]
    if not files:
        raise RecipeError(f"{path} has no images in class folders", f"give {FORMS}")

    def read(number: int) -> dict[str, Any]:
        return {"image": str(files[number][0]), "label": files[number][1]}

    def name(number: int) -> str:
        return str(files[number][0].relative_to(path))

    return Rows(path, ("image", "label"), read, len(files), name, tuple(classes))


def label_numbers(
    rows: Rows, values: Sequence[tuple[int, Any]], classes: Sequence[str] | None, count: int | None
) -> torch.Tensor:
    """Labels as numbers (n,): of (row, value) pairs, values being numbers or names of ``classes``.

    Raises `RecipeError` naming the row for a label outside the ``count`` classes (or the named ones), and for names
    where no classes are given.
    """
    numbers = []
    if classes is not None:
        count = len(classes)
    place = {name: n for n, name in enumerate(classes or ())}
    for row, value in values:
        if isinstance(value, str) and value in place:
            numbers.append(place[value])
            continue
        if isinstance(value, str) and not value.lstrip("-").isdigit():
            if classes is None:
                raise RecipeError(f"{rows.where(row)}: the label {value!r} is a name", "list the names: classes: [...]")
            raise RecipeError(f"{rows.where(row)}: no class {value!r}", did_you_mean(value, place))
        try:
            number = int(value)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{rows.where(row)}: {value!r} is no label", "a whole number or a class name") from error
        if number != float(value) or number < 0 or (count is not None and number >= count):
            limit = "" if count is None else f" up to {count - 1}"
            raise RecipeError(f"{rows.where(row)}: label {value} is outside the classes", f"numbers from 0{limit}")
        numbers.append(number)
    return torch.tensor(numbers, dtype=torch.long)
