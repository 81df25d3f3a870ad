"""What a merge in pieces asks of the machine: one thread, and memory that it keeps from one piece to the next."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

ARENA = 1 << 24
"""Bytes of the block that `keep_pages` allocates."""


def keep_pages() -> None:
    """Have the allocator keep the memory that pieces free, for the pieces that follow.

    glibc gives free memory at the end of its heap back to the system above a limit, which it sets at twice the largest
    mapped block it has seen freed (mallopt(3)); so one is allocated and freed here, without touching its pages.
    Otherwise every piece faults its pages in anew, which takes as long as its arithmetic. Other allocators ignore it.
    """
    torch.empty(ARENA, dtype=torch.uint8)


@contextlib.contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """One thread for pieces that fit a cache: memory is the limit there, and threads that wait for each other after
    every operation slow a busy machine down thirtyfold."""
    threads = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
