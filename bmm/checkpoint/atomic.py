"""Folders that appear whole or not at all: written beside their place under another name, renamed as the last step."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from ..errors import WriteError
from .formats import reason

FINISHED = ".finished"
"""Ends the name of a file that is whole, in a folder that is not."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn operating-system errors of the writes inside into a `WriteError` about ``folder``."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "free some disk space or write elsewhere",
            errno.EDQUOT: "free some of your quota or write elsewhere",
            errno.EROFS: "the file system is read-only: write elsewhere",
            errno.ENOENT: "the folder was removed during the write: start again",
            errno.ENOTEMPTY: "it was filled during the write: give another folder",
        }
        hint = hints.get(error.errno or 0, "check the path, its rights and the space left")
        raise WriteError(f"{folder}: cannot be written ({reason(error)})", hint) from error


def destination(folder: str | Path, overwrite: bool, inputs: tuple[Path, ...] = ()) -> Path:
    """The resolved folder, once it is clear that it may be written; `WriteError` if not.

    ``overwrite`` replaces a folder of model files only: one with sub-folders (other than heads), or without weights, is
    somebody's other work. A folder that is or holds one of ``inputs`` is refused whatever ``overwrite`` says.
    """
    with writing(Path(folder)):
        target = Path(folder).expanduser().resolve()
        here = Path.cwd()
        if target == here or target in here.parents or not target.name:
            raise WriteError(f"{target}: the current folder or one above it", "give a new folder inside it")
        for source in (path.expanduser().resolve() for path in inputs):
            if target == source or target in source.parents:
                raise WriteError(f"{target}: overlaps the input {source}", "write to another folder")
        if target.exists() and not target.is_dir():
            raise WriteError(f"{target}: a file is in the way", "give the path of a folder")
        entries = list(target.iterdir()) if target.exists() else []
        if entries and not overwrite:
            raise WriteError(f"{target}: the folder is not empty", "give another folder, or overwrite it: --overwrite")
        weights = any(entry.name.endswith((".safetensors", ".bin")) for entry in entries)
        if entries and (not weights or any(entry.is_dir() and entry.name != "heads" for entry in entries)):
            raise WriteError(
                f"{target}: holds more, or other, than a model's files and is not overwritten", "remove it yourself"
            )
        require_place(target.parent)
    return target


def require_place(folder: Path) -> None:
    """Raise `WriteError` where a folder is none, or cannot be made or written to: said before there is work to lose."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    if not place.is_dir():
        raise WriteError(f"{folder}: cannot be written ({place} is a file)", "give the path of a folder")
    with writing(folder):
        if not os.access(place, os.W_OK | os.X_OK):
            code = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(code, os.strerror(code))


@contextmanager
def atomic_folder(target: Path, overwrite: bool = False, key: int | None = None) -> Iterator[Path]:
    """A temporary folder ``.NAME.incomplete-PID`` beside ``target`` that takes its place when the block ends well.

    Where the block raises, the temporary folder is removed and the error goes on. A process that is killed leaves it
    behind under that name, which `open_checkpoint` refuses. With ``overwrite`` a folder at ``target`` is set aside as
    ``.NAME.replaced-PID`` for the moment of the swap and removed after it; without, one that holds anything is an
    error, also where it was filled in the meantime.

    With a ``key`` the folder is ``.NAME.incomplete-KEY``, may hold what an earlier process left there, and stays, for
    the next one, where the block raises and it holds `FINISHED` files. `WriteError` where another process is at it.
    """
    lock = None
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if key is None:
            temporary = _make_beside(target, "incomplete")
        else:
            temporary = target.with_name(f".{target.name}.incomplete-{key}")
            temporary.mkdir(exist_ok=True)
            lock = _locked(temporary, target)
    try:
        yield temporary
        with writing(target):
            sync(temporary)
            _swap(temporary, target, overwrite)
    except BaseException:
        if key is None or not any(temporary.glob("*" + FINISHED)):
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _locked(folder: Path, target: Path) -> int:
    """A descriptor of the folder that holds it alone until it is closed, or its process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise WriteError(f"{target}: another process is writing it", "wait for it to end, or stop it") from None
    return descriptor


def sync(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(temporary: Path, target: Path, overwrite: bool) -> None:
    replaced = None
    if overwrite and target.exists() and any(target.iterdir()):
        replaced = _make_beside(target, "replaced")
        os.rename(target, replaced)
    try:
        os.rename(temporary, target)  # over an empty folder or nothing, or it fails: one step
    except BaseException:
        if replaced is not None:
            os.rename(replaced, target)
        raise
    sync(target.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _make_beside(target: Path, what: str) -> Path:
    """A new empty folder ``.NAME.WHAT-PID`` (or ``-PID-2`` ... where an earlier process of that id left one)."""
    for attempt in count(1):
        suffix = f"{os.getpid()}" if attempt == 1 else f"{os.getpid()}-{attempt}"
        folder = target.with_name(f".{target.name}.{what}-{suffix}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise AssertionError("unreachable")
