"""One writer a study: an advisory lock that the kernel drops when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import weakref
from pathlib import Path

from bmm.errors import StudyError


class StudyLock:
    """``flock`` on ``<study>.lock``, which also tells who holds it.

    The lock has a file of its own because closing any descriptor of the database file would drop SQLite's own locks.
    The file stays behind after the lock is released: removing it would let two processes lock two different files.
    Raises `StudyError` naming the holder's process and host where the study is taken.
    """

    def __init__(self, study: Path) -> None:
        self.path = study.with_name(study.name + ".lock")
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StudyError(f"cannot create {self.path}: {error.strerror}", "is the folder writable?") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._holder()
            os.close(self._descriptor)
            raise StudyError(
                f"study {study} is in use by {holder}", "wait for it to end or stop it; one process a study"
            ) from None
        except OSError as error:
            os.close(self._descriptor)
            raise StudyError(
                f"cannot lock {self.path}: {error.strerror}", "keep the study on a file system that supports flock"
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        _held.add(self)

    def _holder(self) -> str:
        try:
            holder = json.loads(os.pread(self._descriptor, 4096, 0))
            return f"process {holder['pid']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):  # caught between taking the lock and writing the name
            return "another process"

    def release(self) -> None:
        """Drops the lock; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            _held.discard(self)


_held: weakref.WeakSet[StudyLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    # A forked child (a data loader's worker, say) shares the lock; it must not outlive the parent in it.
    for lock in list(_held):
        with contextlib.suppress(OSError):
            lock.release()


os.register_at_fork(after_in_child=_forget_in_child)
