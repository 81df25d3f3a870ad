"""DARE: drop entries of each task vector at random, rescale the rest, then merge by task arithmetic or TIES.

Every `PIECE` entries of a tensor of every expert have a stream of random numbers of their own, keyed by the seed, the
tensor's name and their *content*. A draw therefore depends neither on the order in which tensors are visited nor on the
order of the experts (a key with the expert's index would), nor on whether the driver hands a large tensor out in
pieces; two identical experts draw the same mask. Masks are drawn on the CPU, so that all devices merge alike.

Hashing and drawing would take longer than the rest of the merge, hence content is folded before it is hashed (`_key`)
and an entry costs 16 random bits (`_drawn`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .anchor import Context, TaskVectors, Whole
from .inputs import PIECE
from .task_arithmetic import task_arithmetic
from .ties import TiesState, scan_ties, ties

FOLD = 509
"""Words of 8 bytes that content is folded to: a prime, so that swapped rows of a matrix still change the sums."""

LEVELS = 1 << 16
"""Values of the random integers that entries are dropped by."""


def drop_and_rescale(taus: Tensor, name: str, drop: float, seed: int) -> Tensor:
    """Each entry is zeroed with probability ``drop`` and otherwise divided by ``1 - drop``; (T, *shape) both ways.

    Unbiased: the expectation over seeds is ``taus``. ``drop`` 0 returns the values unchanged.
    """
    out = torch.empty(taus.shape, dtype=taus.dtype, device=taus.device)  # (T, *shape), contiguous
    for kept, tau in zip(out.view(len(taus), -1), taus.reshape(len(taus), -1), strict=True):  # (n,), (n,)
        for part, piece in zip(kept.split(PIECE), tau.split(PIECE), strict=True):
            content = piece.detach().cpu().contiguous()
            drawn = _drawn(len(piece), drop, _key(content, name, seed))
            torch.mul(piece, drawn.to(piece), out=part).mul_(1 / (1 - drop))
    return out


def _key(content: Tensor, name: str, seed: int) -> int:
    """128 bits of a piece (n,) on the CPU: a hash of the wrapping sums of every `FOLD`-th word, the rest as it is."""
    words = content.numpy().view(np.uint8)
    whole = len(words) // (8 * FOLD) * (8 * FOLD)
    folded = words[:whole].view(np.uint64).reshape(-1, FOLD).sum(0)  # (FOLD,)
    digest = hashlib.blake2b("\x1f".join(map(str, ("dare", seed, name, len(words), ""))).encode(), digest_size=16)
    digest.update(folded.data)
    digest.update(words[whole:].data)
    return int.from_bytes(digest.digest(), "big")


def _drawn(count: int, drop: float, key: int) -> Tensor:
    """``count`` numbers (n,) in float32, 0 with probability ``drop`` and else 1.

    An integer of 16 bits an entry is compared with ``drop * 2^16``, which one more number rounds up or down at random:
    that makes the probability exact, at the price of a covariance below 1e-10 between two entries.
    """
    source = np.random.SFC64(key)
    bound = math.floor(drop * LEVELS + (int(source.random_raw()) >> 11) * 2.0**-53) - LEVELS // 2
    draw = torch.from_numpy(source.random_raw(-(-count // 4)).view(np.int16)[:count])  # (n,), -2^15 to 2^15 - 1
    return draw.to(torch.float32).ge_(bound)  # float32 holds them all, and compares faster


@dataclass(frozen=True)
class _Dropped:
    """A stream of task vectors seen through `drop_and_rescale`; as often iterable as the stream itself."""

    stream: TaskVectors
    drop: float
    seed: int

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, taus in self.stream:
            yield name, drop_and_rescale(taus, name, self.drop, self.seed)


def scan_dare_ties(stream: TaskVectors, knobs: Mapping[str, Any], whole: Whole) -> TiesState:
    """`scan_ties` of the task vectors that dropping leaves."""
    return scan_ties(_Dropped(stream, knobs["drop"], knobs["seed"]), knobs, whole)


def dare_ta(taus: Tensor, context: Context, *, drop: float, seed: int) -> Tensor:
    """DARE, then task arithmetic (arXiv 2311.03099): ``taus`` (T, *shape) -> (*shape).

    One expert at drop 0 and scale 1 gives that expert.
    """
    return task_arithmetic(drop_and_rescale(taus, context.name, drop, seed), context)


def dare_ties(
    taus: Tensor, context: Context, *, drop: float, density: float, reduce: Literal["mean", "sum"], seed: int
) -> Tensor:
    """DARE, then TIES (arXiv 2311.03099): ``taus`` (T, *shape) -> (*shape).

    ``density`` counts against all parameters: trimming bites only where it is below the share ``1 - drop`` that
    dropping leaves. One expert at drop 0 and density 1 gives that expert.
    """
    return ties(drop_and_rescale(taus, context.name, drop, seed), context, density=density, reduce=reduce)
