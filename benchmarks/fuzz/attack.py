"""Mutations run through a reader, and what becomes of them."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import sys
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmm.errors import BmmError

from .mutator import Mutator
from .readers import READERS

ROOM = 512 << 20
"""Bytes of address space a reader's process may take for the mutations."""


@dataclass
class Outcome:
    """What became of the mutations of one reader. ``outside``: files that were opened and lie elsewhere."""

    reader: str
    opened: int = 0
    refused: int = 0
    crashed: Counter[str] = field(default_factory=Counter)
    outside: Counter[str] = field(default_factory=Counter)
    memory: int = 0
    seconds: float = 0.0


class Watch:
    """Notes the files that Python opens outside a folder; code of Python and of packages aside."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: Counter[str] = Counter()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None or event != "open" or not isinstance(args[0], str | bytes):
            return
        path = os.path.realpath(os.fsdecode(args[0]))
        code = path.endswith((".py", ".pyc", ".so")) or any(path.startswith(p) for p in (sys.prefix, sys.base_prefix))
        if not code and not path.startswith((f"{self.folder}/", "/proc/self/", "/sys/", "/dev/")):
            self.seen[path] += 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and prints of what is loaded."""
    with warnings.catch_warnings(), open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            with contextlib.redirect_stderr(sink):
                yield
        finally:
            logging.disable(logging.NOTSET)


def attack(name: str, mutations: int, seed: int, folder: Path, watch: Watch | None = None) -> Outcome:
    """Run one reader over so many mutations, drawn from ``seed``, in ``folder``, which is new."""
    reader, outcome = READERS[name], Outcome(name)
    place = (folder / "place").resolve()
    place.mkdir(parents=True)
    reader.prepare(place)
    with quiet():
        for number in range(max(1, round(mutations * reader.share))):
            reader.mutate(place, Mutator(f"{name} {seed} {number}"))
            if watch:
                watch.folder = None if reader.follows else place
            tracemalloc.start()
            begun = time.perf_counter()
            try:
                reader.read(place)
                outcome.opened += 1
            except BmmError as error:
                outcome.refused += 1
                if "\n" in error.message:
                    outcome.crashed[f"mutation {number}: an error of several lines: {error.message[:200]!r}"] += 1
            except BaseException as error:
                outcome.crashed[f"mutation {number}: {type(error).__name__}: {str(error)[:200]}"] += 1
                if isinstance(error, KeyboardInterrupt):
                    raise
            outcome.seconds = max(outcome.seconds, time.perf_counter() - begun)
            outcome.memory = max(outcome.memory, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            if watch:
                watch.folder = None
    if watch:
        outcome.outside += watch.seen
    return outcome


def confine(room: int = ROOM) -> None:
    """Let this process take no more than ``room`` bytes of address space beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room,) * 2)
