"""Grams, and other statistics, on disk: a cache that is checked before it is believed.

One safetensors file per fingerprint, written to the side and renamed into place, so that a killed run leaves nothing
that looks like a cache. The header carries the code version, the fingerprint, a SHA-256 over all content, and the
names. Whatever does not check out is reported in ``notices`` and treated as absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoint.formats import TensorInfo, as_bytes
from ..checkpoint.safetensors_file import SafetensorsFile
from ..checkpoint.shards import Shard
from ..errors import CheckpointError, GramError, WriteError
from ..notation import Tensors
from .task_grams import TaskGrams
from .triangle import packed, unpacked

CODE_VERSION = 5
"""Raise whenever the way Grams are computed or stored changes: older caches are then rebuilt."""

Found = TypeVar("Found")


_TENSORS = ("grams", "norms")
"""The fields of `TaskGrams` that hold tensors, each written under the field's name and a slash; Grams as triangles."""


def fingerprint(weights_fingerprint: str, inputs: Iterable[Tensor], settings: dict[str, Any]) -> str:
    """SHA-256 (hex) of all that decides a Gram: weights, calibration inputs in order, settings, code version.

    ``settings`` must be JSON (`GramError` otherwise); the order of its keys does not matter.
    """
    try:
        described = json.dumps([CODE_VERSION, weights_fingerprint, settings], sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GramError(
            f"settings of the Gram cache: {error}", "use numbers, strings, lists and dictionaries"
        ) from error
    digest = hashlib.sha256(described.encode())
    for tensor in inputs:
        _hash_tensor(digest, tensor)
    return digest.hexdigest()


def flat(batches: Any) -> Iterator[Tensor]:
    """The tensors of a batch or of batches, in a fixed order, whatever holds them."""
    if isinstance(batches, Tensor):
        yield batches
    elif isinstance(batches, Mapping):
        for key in sorted(batches):
            yield from flat(batches[key])
    elif isinstance(batches, list | tuple | Iterator):
        for item in batches:
            yield from flat(item)


def source_of(thing: Any) -> str:
    """What the code of a function or of a module's class is, so that changing it invalidates what it produced.

    An object with state of its own says what matters of it in its ``cache_key``.
    """
    return f"{_code_of(thing)}{getattr(thing, 'cache_key', '')}"


def _code_of(thing: Any) -> str:
    kind = inspect.unwrap(getattr(thing, "func", thing))
    if not inspect.isroutine(kind) and not inspect.isclass(kind):
        kind = type(kind)
    with contextlib.suppress(OSError, TypeError):
        return inspect.getsource(kind)
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', repr(kind))}"


class TensorStore:
    """A folder of caches, one file a fingerprint; ``notices`` collects what was found stale or damaged, or could not be
    written, a line each, and ``unwritten`` the errors of the latter."""

    what = "tensor"

    def __init__(self, folder: Path | str, unwritten: list[WriteError] | None = None) -> None:
        self.folder = Path(folder)
        self.notices: list[str] = []
        self.unwritten: list[WriteError] = [] if unwritten is None else unwritten

    def save(self, fingerprint: str, found: Any) -> Path:
        """Write what was found, replacing what is there in one step. Raises `WriteError` where that fails."""
        raise NotImplementedError

    def keep(self, fingerprint: str, found: Any) -> None:
        """`save` where that is possible: a cache that cannot be written costs time, not the run."""
        try:
            self.save(fingerprint, found)
        except WriteError as error:
            self.unwritten.append(error)
            self.notices.append(f"{error.message}: going on without")

    def path(self, fingerprint: str) -> Path:
        """The file of a fingerprint. Raises `GramError` for anything but letters, digits, "-" and "_"."""
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", fingerprint):
            raise GramError(f"bad {self.what} fingerprint {fingerprint!r}", "use bmm.grams.fingerprint")
        return self.folder / f"{fingerprint}.safetensors"

    def write(self, fingerprint: str, stored: Mapping[str, Tensor], body: str = "{}") -> Path:
        """Write tensors and a text, replacing what is there in one step. Raises `WriteError` where that fails.

        Tensors are asked for twice, one at a time: for the checksum, which comes first in the file, and to be written.
        """
        path = self.path(fingerprint)
        checksum, infos = _checked(fingerprint, body, stored)
        metadata = {"version": str(CODE_VERSION), "fingerprint": fingerprint, "sha256": checksum, "body": body}
        plan = Shard.plan(infos, metadata)
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=f".{fingerprint[:16]}-", suffix=".part", dir=self.folder)
            with open(handle, "wb") as file:
                file.write(plan.header)
                for key in plan.offsets:  # in the order of their places
                    file.write(as_bytes(stored[key].detach().cpu().contiguous()))
                file.flush()
                os.fsync(file.fileno())  # the name must never outlive the content
            os.replace(temporary, path)
        except OSError as error:
            raise WriteError(
                f"cannot write {self.what}s to {path}: {error}", "free some space or choose another folder"
            ) from error
        finally:
            if temporary is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
        return path

    def read(self, fingerprint: str, read: Callable[[Path, str], Found]) -> Found | None:
        """What ``read(path, fingerprint)`` makes of the file, or None where there is none that can be trusted."""
        path = self.path(fingerprint)
        if not path.exists():
            return None
        try:
            return read(path, fingerprint)
        except Untrusted as reason:
            self.notices.append(f"{self.what} cache {path.name} is {reason}: rebuilding it")
        except Exception as error:  # a damaged file may fail anywhere in the parsers; a cache must never stop a run
            self.notices.append(f"{self.what} cache {path.name} is damaged ({type(error).__name__}): rebuilding it")
        return None


class GramStore(TensorStore):
    """The Gram cache in one folder."""

    what = "Gram"

    def save(self, fingerprint: str, grams: TaskGrams) -> Path:
        """Write the Grams, replacing what is there in one step. Raises `WriteError` where that fails."""
        body = json.dumps({f.name: getattr(grams, f.name) for f in fields(TaskGrams) if f.name not in _TENSORS})
        return self.write(fingerprint, _Triangles(grams), body)

    def load(self, fingerprint: str) -> TaskGrams | None:
        """The Grams of a fingerprint, or None where there are none that can be trusted (see ``notices``).

        The whole file is read once here, tensor by tensor, for its checksum; Grams are read again as they are asked
        for, so that those of a large model are never in memory together.
        """
        return self.read(fingerprint, _read)


class Untrusted(Exception):
    """Why a readable file is not used."""


class _Triangles(Mapping[str, Tensor]):
    """What is written of Grams, by name; each triangle is made when it is asked for."""

    def __init__(self, grams: TaskGrams) -> None:
        self._fields = {kind: getattr(grams, kind) for kind in _TENSORS}

    def __getitem__(self, name: str) -> Tensor:
        kind, _, key = name.partition("/")
        tensor: Tensor = self._fields[kind][key]
        return packed(tensor.detach().cpu()) if kind == "grams" else tensor

    def __iter__(self) -> Iterator[str]:
        return (f"{kind}/{key}" for kind, tensors in self._fields.items() for key in tensors)

    def __len__(self) -> int:
        return sum(map(len, self._fields.values()))


class _OnDisk(Mapping[str, Tensor]):
    """The tensors of a file whose names begin with a prefix, each read, and made what it was, when it is asked for."""

    def __init__(
        self, file: SafetensorsFile, prefix: str = "", made: Callable[[Tensor], Tensor] = lambda stored: stored
    ) -> None:
        self._file, self._prefix, self._made = file, prefix, made
        self._names = [name.removeprefix(prefix) for name in file.infos if name.startswith(prefix)]

    def __getitem__(self, name: str) -> Tensor:
        if self._prefix + name not in self._file.infos:
            raise KeyError(name)
        try:
            return self._made(self._file.read(self._prefix + name))
        except CheckpointError:  # another run may have written the same Grams a second time
            self._file = SafetensorsFile(self._file.path)
            return self._made(self._file.read(self._prefix + name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _read(path: Path, fingerprint: str) -> TaskGrams:
    file = SafetensorsFile(path)
    body = checked_body(path, fingerprint, _OnDisk(file))
    found: dict[str, Any] = {"grams": _OnDisk(file, "grams/", unpacked), "norms": _OnDisk(file, "norms/")}
    return TaskGrams(**found, **json.loads(body))


def checked_body(path: Path, fingerprint: str, tensors: Tensors) -> str:
    """The text stored with ``tensors`` in ``path``, once everything agrees; tensors are read one by one.

    Raises `Untrusted` where version, fingerprint or checksum do not.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("version") != str(CODE_VERSION):
        raise Untrusted(f"stale (version {metadata.get('version')}, this is {CODE_VERSION})")
    if metadata.get("fingerprint") != fingerprint:
        raise Untrusted("stale (of other weights, inputs or settings)")
    if metadata["sha256"] != _checked(fingerprint, metadata["body"], tensors)[0]:
        raise Untrusted("damaged (checksum)")
    return str(metadata["body"])


def _checked(fingerprint: str, body: str, tensors: Tensors) -> tuple[str, dict[str, TensorInfo]]:
    """The checksum of all content, and each tensor's shape and dtype, read once."""
    digest, infos = hashlib.sha256(json.dumps([CODE_VERSION, fingerprint, body]).encode()), dict[str, TensorInfo]()
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(json.dumps(key).encode())
        _hash_tensor(digest, tensor)
        infos[key] = TensorInfo(tuple(tensor.shape), tensor.dtype)
    return digest.hexdigest(), infos


def _hash_tensor(digest: hashlib._Hash, tensor: Tensor) -> None:
    plain = tensor.detach().cpu().contiguous()
    digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
    # a byte view: NumPy has no bfloat16
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
