"""DARE: drop entries of each task vector at random, rescale the rest, then merge by task arithmetic or TIES.

Every `PIECE` entries of a tensor of every expert have their own generator, keyed by the seed, the tensor's name and a
hash of their *content*. A draw therefore depends neither on the order in which tensors are visited nor on the order of
the experts (a key with the expert's index would), nor on whether the driver hands a large tensor out in pieces; two
identical experts draw the same mask. Masks are drawn on the CPU, so that all devices merge alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .anchor import Context, TaskVectors, Whole, named_generator
from .inputs import PIECE
from .task_arithmetic import task_arithmetic
from .ties import TiesState, scan_ties, ties


def drop_and_rescale(taus: Tensor, name: str, drop: float, seed: int) -> Tensor:
    """Each entry is zeroed with probability ``drop`` and otherwise divided by ``1 - drop``; (T, *shape) both ways.

    Unbiased: the expectation over seeds is ``taus``. ``drop`` 0 returns the values unchanged.
    """
    out = torch.empty(taus.shape, dtype=taus.dtype, device=taus.device)  # (T, *shape), contiguous
    for kept, tau in zip(out.view(len(taus), -1), taus.reshape(len(taus), -1), strict=True):  # (n,), (n,)
        for part, piece in zip(kept.split(PIECE), tau.split(PIECE), strict=True):
            content = piece.detach().cpu().contiguous()
            digest = hashlib.blake2b(content.numpy().data, digest_size=16).hexdigest()
            draw = torch.rand(len(piece), generator=named_generator("dare", seed, name, digest))  # in [0, 1)
            torch.mul(piece, draw.ge_(drop).to(piece), out=part).mul_(1 / (1 - drop))
    return out


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
