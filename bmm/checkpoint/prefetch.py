"""What comes next is read by another thread, while what is there is worked with."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Generic, Self, TypeVar

Key = TypeVar("Key")
Item = TypeVar("Item")


class Prefetch(Generic[Key, Item]):
    """``load(key)`` of each of ``keys``, made in order in a thread before they are asked for.

    No more than ``limit`` bytes wait to be taken, by ``size`` of their keys, or one item where it alone is larger: the
    thread stands still until there is room. What `take` gives is the caller's, and not counted any more.
    """

    def __init__(
        self, keys: Iterable[Key], load: Callable[[Key], Item], size: Callable[[Key], int], limit: int
    ) -> None:
        self._load, self._size, self._limit = load, size, limit
        self._due = deque(keys)  # not yet taken
        self._ready: deque[tuple[int, list[Item], BaseException | None]] = deque()
        self._waiting = 0  # bytes of what is ready or being made
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, args=(tuple(self._due),), name="prefetch", daemon=True)
        self._thread.start()

    def take(self, key: Key) -> Item:
        """The item of a key: the next in order, waiting for it, or made here and now if it is another one's turn.

        Raises what its ``load`` raised; nothing more is made ahead then.
        """
        if self._closed or not self._due or self._due[0] != key:
            return self._load(key)
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            size, items, error = self._ready.popleft()
            self._due.popleft()
            self._waiting -= size
            self._changed.notify_all()
        if error is not None:
            self._due.clear()
            raise error
        return items[0]

    def close(self) -> None:
        """End the thread, once it has made what it is at, and forget what was not taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._ready.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, keys: tuple[Key, ...]) -> None:
        for key in keys:
            items: list[Item] = []
            failure: BaseException | None = None
            size = 0
            try:
                size = self._size(key)
                if not self._wait_for_room(size):
                    return
                items.append(self._load(key))
            except BaseException as error:  # it is the taker's
                failure = error
            with self._changed:
                self._ready.append((size, items, failure))
                self._changed.notify_all()
            if failure is not None:
                return

    def _wait_for_room(self, size: int) -> bool:
        """Whether there is room, and not the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._waiting or self._waiting + size <= self._limit)
            self._waiting += 0 if self._closed else size
            return not self._closed
