"""PyTorch files (.bin, .pt, .pth), only ever through ``torch.load(weights_only=True, mmap=True)``."""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .formats import DTYPE_HINT, SUPPORTED, FileStamp, TensorInfo, check_name, reason, some
from .tied import shared_groups

NESTED_KEYS = ("state_dict", "model")
REFUSED = re.compile(r"(?:GLOBAL|class|instantiate|call|function)\s+([\w]+\.[\w.]+)")
MAX_TEXT = 4096
"""Characters of a name in a pickle."""
SAVE_AGAIN = "save it again with torch.save(model.state_dict(), ...) or as safetensors"


class TorchFile:
    """A `TensorFile` over one ``torch.save`` archive, mapped into memory; a tensor's pages are read on access.

    Holds a flat mapping of tensors by name, or one under "state_dict" or "model". Raises `CheckpointError` for a pickle
    that would run code, for archives that are compressed (mapping needs them plain, and no file may grow when read) or
    from before torch 1.6, and for entries that are not dense CPU tensors within their storage.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = FileStamp.take(path)
        self._check_archive()
        self._tensors = self._load()
        self.infos = {name: TensorInfo.of(tensor) for name, tensor in self._tensors.items()}
        self.ties = shared_groups(self._tensors)

    def read(self, name: str) -> Tensor:
        self._stamp.check(self.path)  # a mapped file that shrinks would end the process, not raise
        return self._tensors[name].clone(memory_format=torch.contiguous_format)

    def read_piece(self, name: str, start: int, stop: int) -> Tensor:
        self._stamp.check(self.path)
        return self._tensors[name].reshape(-1)[start:stop].clone()

    def fill(self, name: str, start: int, out: Tensor) -> None:
        self._stamp.check(self.path)
        out.copy_(self._tensors[name].reshape(-1)[start : start + len(out)])

    def _check_archive(self) -> None:
        try:
            with open(self.path, "rb") as file:
                magic = file.read(8)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({reason(error)})", "check its rights") from None
        if magic == b"version ":
            raise CheckpointError(f"{self.path}: a git-lfs pointer, not the weights", "run `git lfs pull` there")
        if not magic.startswith(b"PK"):
            raise CheckpointError(f"{self.path}: no torch.save archive, or one from before torch 1.6", SAVE_AGAIN)
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = archive.infolist()
                self._check_pickle(archive, [entry for entry in entries if entry.filename.endswith("/data.pkl")])
        except CheckpointError:
            raise
        except Exception as error:  # a damaged directory raises nearly anything
            raise CheckpointError(f"{self.path}: damaged archive ({reason(error)})", SAVE_AGAIN) from None
        total = sum(entry.file_size for entry in entries)
        if total > self._stamp.size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CheckpointError(f"{self.path}: a compressed or damaged archive", SAVE_AGAIN)

    def _check_pickle(self, archive: zipfile.ZipFile, pickles: list[zipfile.ZipInfo]) -> None:
        """Refuse long texts: what torch says of a class it does not load takes hours where the name is long."""
        for entry in pickles:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > self._stamp.size:
                continue  # refused below
            entry.CRC = None  # type: ignore[assignment]  # torch may be told to write no checksums
            try:
                texts = [arg for _, arg, _ in pickletools.genops(archive.read(entry)) if isinstance(arg, str)]
            except Exception as error:  # as for the archive
                raise CheckpointError(f"{self.path}: cannot be loaded (damaged pickle)", SAVE_AGAIN) from error
            longest = max(map(len, texts), default=0)
            if longest > MAX_TEXT:
                raise CheckpointError(f"{self.path}: its pickle holds a text of {longest} characters", SAVE_AGAIN)

    def _load(self) -> dict[str, Tensor]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a damaged or hostile pickle raises nearly anything
            if refused := REFUSED.search(str(error)):
                raise CheckpointError(
                    f"{self.path}: holds {refused[1]}, which is not loaded because objects other than tensors can run "
                    "code",
                    SAVE_AGAIN,
                ) from None
            # torch's own text advises weights_only=False, which must never be passed on
            why = "damaged pickle" if isinstance(error, pickle.UnpicklingError) else reason(error)
            raise CheckpointError(f"{self.path}: cannot be loaded ({why})", SAVE_AGAIN) from None
        return self._flat(loaded)

    def _flat(self, loaded: Any) -> dict[str, Tensor]:
        if isinstance(loaded, Mapping):
            for key in NESTED_KEYS:
                if isinstance(loaded.get(key), Mapping):
                    loaded = loaded[key]
                    break
        if not isinstance(loaded, Mapping):
            raise CheckpointError(f"{self.path}: holds a {type(loaded).__name__}, no tensors by name", SAVE_AGAIN)
        others = [key for key, value in loaded.items() if not isinstance(value, Tensor)]
        if others:
            raise CheckpointError(
                f"{self.path}: {len(others)} entries are not tensors: {some(repr(key) for key in others)}", SAVE_AGAIN
            )
        tensors = {}
        for name, tensor in loaded.items():
            check_name(self.path, name)
            self._check_tensor(name, tensor)
            tensors[name] = tensor.detach()
        return tensors

    def _check_tensor(self, name: str, tensor: Tensor) -> None:
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise CheckpointError(f"{self.path}: tensor {name!r} is not a dense CPU tensor", SAVE_AGAIN)
        if tensor.dtype not in SUPPORTED.values():
            raise CheckpointError(f"{self.path}: tensor {name!r} has unsupported dtype {tensor.dtype}", DTYPE_HINT)
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            # an expanded view: a few stored bytes that would become any amount of memory
            raise CheckpointError(f"{self.path}: tensor {name!r} is larger than what is stored of it", SAVE_AGAIN)
