"""Any object with tensors in it as one file of numbers that many processes map: read once, held in memory once.

The object is pickled with references in place of its tensors; their storages, each once, make the file. Views, strides
and tensors that share memory come back as they were, so that a computation gives the same bits in every process.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import pickletools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import WriteError

_ALIGNMENT = 64  # bytes
Numbers = Path | NDArray[np.uint8]
"""The storages' bytes: a file to map, or an array that is mapped already."""


@dataclass(frozen=True)
class Shared:
    """A packed object: ``structure`` is its pickle, ``places`` offset, size in bytes and device of every storage."""

    structure: bytes
    places: tuple[tuple[int, int, str], ...]
    numbers: Numbers

    def open(self, device: torch.device | str = "cpu") -> Any:
        """The object. Tensors that were on the CPU are read from the map, others are copied to ``device``.

        A change to a tensor stays in the process that makes it, or fails where the array is read-only.
        """
        whole = _mapped(self.numbers)
        storages = []
        for start, size, kind in self.places:
            part = whole[start : start + size]
            storages.append(part if kind == "cpu" else part.to(device, copy=True))
        return _Unpickler(io.BytesIO(self.structure), storages).load()

    def as_array(self) -> Shared:
        """The same with the file mapped as an array, for object stores that share arrays."""
        if not isinstance(self.numbers, Path):
            return self
        empty = self.numbers.stat().st_size == 0
        mapped = np.zeros(0, np.uint8) if empty else np.asarray(np.memmap(self.numbers, np.uint8, "r"))
        return Shared(self.structure, self.places, mapped)


def share(value: Any, file: Path) -> Shared:
    """Packs ``value`` and writes its storages to ``file``, in place of whatever is there.

    Processes that map an older file keep it. Raises `WriteError`, and what pickle raises for what cannot be sent.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(value)
    places, end = [], 0
    try:
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
        with open(file, "xb") as out:
            for storage in pickler.storages:
                data = _bytes_of(storage).cpu().numpy()
                out.write(bytes(end - out.tell()))
                out.write(data.data)
                places.append((end, data.size, storage.device.type))
                end = -(-(end + data.size) // _ALIGNMENT) * _ALIGNMENT
    except OSError as error:
        with contextlib.suppress(OSError):
            file.unlink()
        raise WriteError(f"cannot write {file}: {error.strerror}", "is the disk full?") from error
    return Shared(buffer.getvalue(), tuple(places), file)


def names_main(value: Any) -> bool:
    """Whether ``value``, which is pickled to find out, holds something defined in the script that is running.

    Raises what pickle raises for what cannot be sent. Tensors' numbers are not touched.
    """
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return any(argument == "__main__" for _, argument, _ in pickletools.genops(buffer.getvalue()))


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=5)
        self.storages: list[torch.UntypedStorage] = []
        self._index: dict[tuple[str, int], int] = {}

    def persistent_id(self, value: Any) -> Any:
        if not _is_plain(value):
            return None
        storage = value.untyped_storage()
        key = (str(storage.device), storage.data_ptr() or -1 - len(self.storages))  # empty ones have no address
        if key not in self._index:
            self._index[key] = len(self.storages)
            self.storages.append(storage)
        layout = (tuple(value.shape), value.stride(), value.storage_offset())
        return self._index[key], value.dtype, *layout


class _Unpickler(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, storages: list[Tensor]) -> None:
        super().__init__(buffer)
        self._storages = storages  # as bytes

    def persistent_load(self, reference: Any) -> Tensor:
        index, dtype, shape, stride, offset = reference
        part = self._storages[index]
        if not part.numel():
            return torch.empty(shape, dtype=dtype, device=part.device)
        typed = part[: part.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        return typed.as_strided(shape, stride, typed.storage_offset() + offset)


def _is_plain(value: Any) -> bool:
    """Whether a tensor is nothing but numbers in a layout: no parameter, no subclass, no graph, no lazy view."""
    return (
        type(value) is Tensor
        and value.layout == torch.strided
        and not (value.requires_grad or value.is_meta or value.is_quantized or value.is_conj() or value.is_neg())
    )


def _bytes_of(storage: Any) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _mapped(numbers: Numbers) -> Tensor:
    """The bytes as one tensor over the map."""
    if isinstance(numbers, Path):
        size = os.path.getsize(numbers)
        return _bytes_of(torch.UntypedStorage.from_file(str(numbers), False, size)) if size else torch.empty(0).byte()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of read-only arrays: nothing here writes
        return torch.from_numpy(numbers)
