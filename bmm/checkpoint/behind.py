"""Large files leave the page cache while they are written: what is on disk makes room for what comes."""

from __future__ import annotations

import os

LARGE = 1 << 30
"""Bytes of a file from which on it is written behind: smaller ones stay in the cache for who loads them next."""

WINDOW = 1 << 25
"""Bytes that are written before the system is told to bring them to disk."""


class WriteBehind:
    """Brings a file of ``size`` bytes to disk window by window, and drops the pages of windows that are there.

    Left alone the system collects a tenth of the memory or more before it starts to write; a merge would then evict
    its own inputs from the cache, touch fresh memory for every page, and stand still when the file is completed. Where
    the system offers no such call, and for files smaller than `LARGE`, nothing is done.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._on = size >= LARGE and hasattr(os, "posix_fadvise")
        self._start: int | None = None  # where the window begins
        self._before: int | None = None  # where the one before it began
        self._count = 0

    def wrote(self, offset: int, count: int) -> None:
        """So many bytes were written there; in any order, though a rising one serves best."""
        if not self._on:
            return
        self._start = offset if self._start is None else min(self._start, offset)
        self._count += count
        if self._count >= WINDOW:
            begin = self._start if self._before is None else min(self._before, self._start)
            # Dirty pages begin to be written, clean ones are dropped: those of the window before, by now.
            os.posix_fadvise(self._descriptor, begin, offset + count - begin, os.POSIX_FADV_DONTNEED)
            self._before, self._start, self._count = self._start, None, 0
