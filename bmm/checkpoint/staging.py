"""Tensors of several checkpoints on their way to a device: read ahead into page-locked memory, copied beside the
computing.

Page-locked ("pinned") memory is what a GPU reads by itself: a copy from there runs on a stream of its own, while the
host reads the next tensor and the device works with the last. The allocator of pinned memory keeps blocks that are
freed and gives them out again when their copies have ended; nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg import largest
from .agreement import on_disk
from .formats import TensorInfo
from .prefetch import Prefetch
from .reader import Checkpoint

AHEAD = 1 << 28
"""Bytes that wait to be taken at most; more only where one tensor of all models is larger."""


class Staged(NamedTuple):
    """A tensor, or some entries of it (n,), on the device, and the `largest` of a floating one."""

    tensor: Tensor
    extreme: float


Key = tuple[str, int, int]
"""A name, and its entries from the one to the other; to -1 for the whole tensor."""


class Sent(NamedTuple):
    """The tensors of all models on their way, the event that ends it, and their extremes."""

    tensors: list[Tensor]
    event: torch.Event | None
    extremes: list[float]


def apart(device: torch.device) -> bool:
    """Whether copies to the device can run beside the computing there."""
    return device.type == "cuda"


def all_on_disk(models: Sequence[Mapping[str, Tensor]], names: Iterable[str]) -> bool:
    """Whether every model reads each of these from a file."""
    return all(on_disk(model, name) is not None for name in names for model in models)


class Staging:
    """The given parts of the models' tensors, in order: a name, and the entries or None for the whole tensor.

    Made where `apart` says so; elsewhere it works too, without overlapping copies.
    """

    def __init__(
        self,
        models: Sequence[Mapping[str, Tensor]],
        parts: Iterable[tuple[str, slice | None]],
        device: torch.device,
        limit: int = AHEAD,
    ) -> None:
        self._models, self._link = models, _Link(device)
        keys = [_key(name, where) for name, where in parts]
        self._ahead = Prefetch(keys, self._load, self._size, limit)

    def take(self, name: str, where: slice | None = None) -> list[Staged]:
        """That part of each model's tensor, ready for what is computed from now on. `CheckpointError` as reading."""
        sent = self._ahead.take(_key(name, where))
        self._link.receive(sent)
        return [Staged(*pair) for pair in zip(sent.tensors, sent.extremes, strict=True)]

    def close(self) -> None:
        """Read no more."""
        self._ahead.close()

    def _size(self, key: Key) -> int:
        name, start, stop = key
        infos = [_found(model, name)[1] for model in self._models]
        return sum(info.dtype.itemsize * (info.numel if stop < 0 else stop - start) for info in infos)

    def _load(self, key: Key) -> Sent:
        name, start, stop = key
        host = []
        for model in self._models:
            (checkpoint, stored), info = _found(model, name)
            room = self._link.room(info.numel if stop < 0 else stop - start, info.dtype)
            checkpoint.fill(stored, start, room)
            host.append(room.view(info.shape) if stop < 0 else room)
        extremes = [largest(tensor) if tensor.is_floating_point() else 0.0 for tensor in host]
        return Sent(*self._link.send(host), extremes)


class _Link:
    """The way to a device: page-locked memory and a stream of its own where that is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def room(self, count: int, dtype: torch.dtype) -> Tensor:
        """Host memory (count,) to read into."""
        return torch.empty(count, dtype=dtype, pin_memory=self._stream is not None)

    def send(self, host: Sequence[Tensor]) -> tuple[list[Tensor], torch.Event | None]:
        """The tensors on the device, and what is to be waited for before they are used."""
        if self._stream is None:
            return [tensor.to(self._device) for tensor in host], None
        with torch.cuda.stream(self._stream):  # in this thread alone
            sent = [tensor.to(self._device, non_blocking=True) for tensor in host]
            return sent, self._stream.record_event()

    def receive(self, sent: Sent) -> None:
        """Have what is computed from now on wait for the copies, and their memory for what is computed."""
        if sent.event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(sent.event)
            for tensor in sent.tensors:
                tensor.record_stream(current)


def _found(model: Mapping[str, Tensor], name: str) -> tuple[tuple[Checkpoint, str], TensorInfo]:
    """Where a model's tensor lies on disk, and its outline."""
    found = on_disk(model, name)
    assert found is not None, "stage what is on disk"
    return found, found[0].info(found[1])


def _key(name: str, where: slice | None) -> Key:
    return (name, 0, -1) if where is None else (name, where.start, where.stop)
