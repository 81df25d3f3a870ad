"""Validation inputs kept out of a search, so that its final choice sees inputs on which nothing was chosen yet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from ..errors import RecipeError
from .padded import taken
from .task import Task, batch_length, holds_whole

HIGHEST_SHARE = 0.5


def held_out(count: int, share: float, seed: int, name: str) -> Tensor:
    """Which of a task's first ``count`` inputs are held out: booleans (count,).

    One input, drawn at random, of every ``1 / share`` in a row: data sorted by class give both parts all classes. What
    is said of an input does not depend on how many follow.
    """
    strata = math.floor(count * share) + 1
    edges = np.ceil(np.arange(strata + 1) / share)  # (strata + 1,)
    generator = np.random.default_rng([seed, crc32(name.encode())])
    picked = edges[:-1] + np.floor(generator.random(strata) * np.diff(edges))  # (strata,)
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.from_numpy(picked[picked < count]).long()] = True
    return mask


def split_validation(tasks: Sequence[Task], share: float, seed: int) -> tuple[list[Task], list[Task]]:
    """The tasks with the validation inputs the search sees, and those with the ones it does not.

    Data held whole are split at once, batches as they are read: these must come in the same order every time. Without
    a share to hold out, the tasks as they are, and none.

    Raises `RecipeError` where a task would be left without inputs in one of the parts.
    """
    if not share:
        return list(tasks), []
    return [_part(t, share, seed, False) for t in tasks], [_part(t, share, seed, True) for t in tasks]


def _part(task: Task, share: float, seed: int, held: bool) -> Task:
    data = task.validation
    if not holds_whole(data):
        return replace(task, validation=_Batches(task, share, seed, held))
    pair = isinstance(data, tuple)
    inputs = data[0] if pair else data
    mask = held_out(batch_length(inputs), share, seed, task.name) == held  # (n,)
    if not mask.any():
        raise RecipeError(
            f"holdout {share:g} of the {len(mask)} validation inputs of task {task.name!r} leaves a part empty",
            "give the task more validation inputs, or another holdout",
        )
    kept = taken(inputs, mask)
    return replace(task, validation=(kept, data[1][mask]) if pair else kept)


class _Batches:
    """One part of validation data that come in batches; a batch of which nothing is left is left out."""

    def __init__(self, task: Task, share: float, seed: int, held: bool) -> None:
        self._task, self._share, self._seed, self._held = task, share, seed, held

    def __iter__(self) -> Iterator[Any]:
        seen = 0
        for inputs, targets in self._task.pairs("validation"):
            length = batch_length(inputs)
            mask = held_out(seen + length, self._share, self._seed, self._task.name)[seen:] == self._held
            seen += length
            if mask.any():
                kept = taken(inputs, mask)
                yield kept if targets is None else (kept, targets[mask])
