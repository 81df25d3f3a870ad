"""A study on disk: one SQLite file, the single truth about what was tried and what came out.

A trial is committed before it is evaluated ("pending") and again after ("completed", "stopped", "failed"), each commit
in its own transaction with ``journal_mode=WAL`` and ``synchronous=FULL``. A killed process loses nothing it committed,
since the pages are with the kernel; FULL also syncs the log, so that neither does a power cut. That is two syncs a
trial.

Floats are written by JSON with their shortest exact text or as 8-byte SQLite reals, and read back bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from bmm.errors import StudyError
from bmm.records import Hyperparameters, Trial, with_new_names
from bmm.search.lock import StudyLock

SCHEMA = 2

_TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    """CREATE TABLE trials (
        number INTEGER PRIMARY KEY,
        kind TEXT NOT NULL CHECK (kind IN ('anchor', 'default', 'search')),
        status TEXT NOT NULL CHECK (status IN ('pending', 'completed', 'stopped', 'failed')),
        hyperparameters TEXT NOT NULL,
        scores TEXT NOT NULL,
        objective REAL,
        suggest_seconds REAL NOT NULL,
        seconds REAL NOT NULL,
        error TEXT NOT NULL,
        notice TEXT NOT NULL,
        began_at REAL NOT NULL,
        ended_at REAL
    )""",
)
_HELD_OUT = """CREATE TABLE IF NOT EXISTS held_out (
    trial INTEGER NOT NULL, task TEXT NOT NULL, scores TEXT NOT NULL, PRIMARY KEY (trial, task)
)"""
_COLUMNS = "number, kind, status, hyperparameters, scores, objective, suggest_seconds, seconds, error"


class StudyDatabase:
    """An open study. Use `create` or `open`, and `close` it or use it in a ``with`` block.

    A writer holds the study's lock from opening to closing; readers (``readonly=True``) need none.
    Every method raises `StudyError` where the file cannot be read or written.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: StudyLock | None) -> None:
        self.path = path
        self._connection = connection
        self._lock = lock

    @classmethod
    def create(cls, path: str | Path, meta: Mapping[str, Any]) -> StudyDatabase:
        """A new study with ``meta`` (JSON values by key), or `StudyError` where ``path`` already exists.

        Tables and meta appear in one transaction. What a process killed before that commit left behind holds no
        table, and is taken over.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(
                f"cannot create the folder {path.parent}: {error.strerror}", "give another folder for the study"
            ) from error
        lock = StudyLock(path)
        connection: sqlite3.Connection | None = None
        try:
            with _readable_errors(path):
                connection = _connect(path, "rwc")
                tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if tables:
                raise StudyError(f"{path} already exists", "resume it, or choose another folder for a new study")
            with _readable_errors(path):
                connection.execute("PRAGMA journal_mode = WAL")
            database = cls(path, connection, lock)
            with database._transaction():
                for table in _TABLES:
                    connection.execute(table)
                for key, value in {**meta, "schema": SCHEMA}.items():
                    database._put(key, value)
        except BaseException:
            if connection is not None:
                connection.close()
            lock.release()
            raise
        return database

    @staticmethod
    def begun(path: str | Path) -> bool:
        """Whether `create` would refuse this path: there is a file, and it is not the empty rest of a cut-off start."""
        path = Path(path)
        if not path.is_file():
            return path.exists()
        try:
            with contextlib.closing(_connect(path, "ro")) as connection:
                return bool(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
        except sqlite3.Error:
            return True

    @classmethod
    def open(cls, path: str | Path, readonly: bool = False) -> StudyDatabase:
        """An existing study; `StudyError` where it is absent, no study, damaged, newer than this code, or in use."""
        path = Path(path)
        if not path.is_file():
            raise StudyError(f"no study at {path}", "give the file that `bmm tune` wrote")
        lock = None if readonly else StudyLock(path)
        connection: sqlite3.Connection | None = None
        try:
            with _readable_errors(path):
                connection = _connect(path, "ro" if readonly else "rw")
                _check(path, connection)
        except BaseException:
            if connection is not None:
                connection.close()
            if lock is not None:
                lock.release()
            raise
        return cls(path, connection, lock)

    def meta(self) -> dict[str, Any]:
        """Everything recorded about the study as a whole, by key."""
        with _readable_errors(self.path):
            rows = self._connection.execute("SELECT key, value FROM meta").fetchall()
        with _readable_rows(self.path):
            found = {key: json.loads(value) for key, value in rows}
            return found | {key: with_new_names(found[key]) for key in ("recipe", "search") if key in found}

    def set_meta(self, key: str, value: Any) -> None:
        """Records or replaces one JSON value."""
        with self._transaction():
            self._put(key, value)

    def trials(self) -> list[Trial]:
        """All rows, by number."""
        with _readable_errors(self.path):
            rows = self._connection.execute(f"SELECT {_COLUMNS} FROM trials ORDER BY number").fetchall()
        with _readable_rows(self.path):
            return [_trial(row) for row in rows]

    def notices(self) -> dict[int, str]:
        """What an engine had to say about how it came to a suggestion, by trial number."""
        with _readable_errors(self.path):
            return dict(self._connection.execute("SELECT number, notice FROM trials WHERE notice <> ''"))

    def begin(self, trial: Trial, notice: str = "") -> None:
        """Commits a pending trial, before its evaluation."""
        with self._transaction():
            self._connection.execute(
                f"INSERT INTO trials ({_COLUMNS}, notice, began_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*_row(trial), notice, time.time()),
            )

    def finish(self, trial: Trial) -> None:
        """Commits the outcome of a pending trial; `StudyError` where there is no such pending trial."""
        with self._transaction():
            changed = self._connection.execute(
                "UPDATE trials SET status = ?, scores = ?, objective = ?, seconds = ?, error = ?, ended_at = ?"
                " WHERE number = ? AND status = 'pending'",
                (
                    trial.status,
                    json.dumps(trial.scores, allow_nan=False),
                    trial.objective,
                    trial.seconds,
                    trial.error,
                    time.time(),
                    trial.number,
                ),
            ).rowcount
            if changed != 1:
                raise StudyError(f"{self.path}: trial {trial.number} is not pending, so it cannot be finished")

    def held_out(self) -> dict[tuple[int, str], list[float]]:
        """Scores on held-out inputs, one number an input, by trial number and task."""
        with _readable_errors(self.path):
            self._connection.execute(_HELD_OUT)
            rows = self._connection.execute("SELECT trial, task, scores FROM held_out").fetchall()
        with _readable_rows(self.path):
            return {(trial, task): json.loads(scores) for trial, task, scores in rows}

    def keep_held_out(self, trial: int, scores: Mapping[str, Sequence[float]]) -> None:
        """Commits a trial's scores on held-out inputs, one number an input, by task."""
        with self._transaction():
            self._connection.execute(_HELD_OUT)
            self._connection.executemany(
                "INSERT OR REPLACE INTO held_out VALUES (?, ?, ?)",
                [(trial, task, json.dumps(list(values))) for task, values in scores.items()],
            )

    def close(self) -> None:
        """Closes the file and releases the lock; a second call does nothing."""
        with _readable_errors(self.path):
            self._connection.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> StudyDatabase:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _put(self, key: str, value: Any) -> None:
        self._connection.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            (key, json.dumps(value, allow_nan=False)),
        )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with _readable_errors(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"file:{quote(str(path.absolute()))}"
    connection = sqlite3.connect(f"{uri}?mode={mode}", uri=True, isolation_level=None, timeout=30)
    if mode != "ro":
        connection.execute("PRAGMA synchronous = FULL")
        return connection
    try:
        connection.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        connection.close()
        if path.with_name(path.name + "-wal").exists():
            raise
        # A reader of WAL files wants to write the shared index beside them. In a folder it may not write to, and with
        # no log left to replay, the file can be read as it stands.
        connection = sqlite3.connect(f"{uri}?immutable=1", uri=True, isolation_level=None)
    return connection


def _check(path: Path, connection: sqlite3.Connection) -> None:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not {"meta", "trials"} <= tables:
        raise StudyError(f"{path} is not a study", "give the file that `bmm tune` wrote, or start a new study")
    found = connection.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
    with _readable_rows(path):
        schema = json.loads(found[0]) if found else None
    if not isinstance(schema, int) or schema < 1:
        raise StudyError(f"{path} is not a study: it states no schema version")
    if schema > SCHEMA:
        raise StudyError(
            f"{path} was written by a newer bmm (schema {schema}, this one reads up to {SCHEMA})", "upgrade bmm-tuner"
        )
    if (verdict := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise StudyError(
            f"{path} is damaged: {' '.join(str(verdict).split())}", "restore it from a copy, or start a new study"
        )


def _line(said: object) -> str:
    """SQLite quotes what it finds in a damaged file, line ends included."""
    return " ".join(str(said).split())


@contextlib.contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StudyError(
            f"cannot use the study {path}: {_line(error)}",
            "is the folder readable and writable, the disk not full?",
        ) from error
    except sqlite3.IntegrityError as error:
        raise StudyError(f"study {path}: {error}") from error
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise StudyError(
            f"{path} is damaged or not a study: {_line(error)}",
            "restore it from a copy, or start a new study",
        ) from error


@contextlib.contextmanager
def _readable_rows(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(f"{path} is damaged: a row cannot be read ({error})", "restore it from a copy") from error


def _row(trial: Trial) -> tuple[Any, ...]:
    return (
        trial.number,
        trial.kind,
        trial.status,
        json.dumps(trial.hyperparameters.to_json(), allow_nan=False),
        json.dumps(trial.scores, allow_nan=False),
        trial.objective,
        trial.suggest_seconds,
        trial.seconds,
        trial.error,
    )


def _trial(row: tuple[Any, ...]) -> Trial:
    number, kind, status, hyperparameters, scores, *rest = row
    return Trial(
        number, kind, status, Hyperparameters.from_json(json.loads(hyperparameters)), json.loads(scores), *rest
    )
