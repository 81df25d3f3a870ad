"""The model pool: one base and its experts, known to agree, read tensor by tensor."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import CheckpointError, WriteError, did_you_mean
from ..linalg import all_finite
from .adapter_names import NameFinder
from .agreement import TiedView, align, info_of, require_tensors, ties_of
from .formats import TensorInfo, fingerprint_tensors
from .heads import Heads, separate_heads
from .opening import open_model
from .reader import Checkpoint, open_checkpoint
from .vocabulary import align_vocabularies

Value = TypeVar("Value")


class ModelPool:
    """A base and T experts with the same names, shapes and floating kinds.

    Args:
        base: an open `Checkpoint` or a mapping of tensors by name.
        experts: T >= 1 of the same, in the order that task vectors and results keep.
        task_names: T names; by default the experts' file or folder names where these are unlike, else
            "expert1", "expert2", ...

    Raises `CheckpointError` where an expert does not agree, with counts, the first names of each kind, and the remedy.
    Storage dtypes may differ. Ties are the base's and must hold in every expert; a tied weight counts once, under its
    first name, and `with_ties` puts the others back.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        experts: Sequence[Mapping[str, Tensor]],
        task_names: Sequence[str] | None = None,
    ) -> None:
        if not experts:
            raise CheckpointError("no experts to merge", "give at least one checkpoint fine-tuned from the base")
        self.tasks: tuple[str, ...] = _task_names(experts, task_names)
        require_tensors(base, _label("the base", base))
        self.base = base
        self.tied: tuple[tuple[str, ...], ...] = ties_of(base)
        aligned = []
        for task, expert in zip(self.tasks, experts, strict=True):
            label = _label(f"expert {task!r}", expert)
            require_tensors(expert, label)
            aligned.append(align(base, self.tied, expert, label))
        self.experts: tuple[Mapping[str, Tensor], ...] = tuple(aligned)
        """The experts, each with exactly the base's names."""
        self.aliases: dict[str, str] = {name: group[0] for group in self.tied for name in group[1:]}
        """Tied name -> the name under which the weight is merged."""
        self.heads: Heads = {}
        """The experts' own heads by task, where they are to be kept beside the merge."""
        self._stored_as: NameFinder | None = None
        self._notices: list[str] = []

    @classmethod
    def open(
        cls,
        base: str | Path,
        experts: Sequence[str | Path],
        skip: Sequence[str] = (),
        task_names: Sequence[str] | None = None,
        stored_as: NameFinder | None = None,
        vocabulary: str = "refuse",
        heads: str = "refuse",
    ) -> ModelPool:
        """Open the checkpoints and pool them; a ``skip`` pattern that matches no name of any of them is an error.

        An expert may be a PEFT adapter on the base, for whose names ``stored_as`` is: see `open_adapter`. For
        ``vocabulary`` see `align_vocabularies`, for ``heads`` `separate_heads`.
        """
        start = open_checkpoint(base, skip)
        opened = [start, *(open_model(path, start, skip, stored_as) for path in experts)]
        for pattern in skip:
            if not any(fnmatch.fnmatchcase(name, pattern) for checkpoint in opened for name in checkpoint.skipped):
                raise CheckpointError(
                    f"skip: {pattern!r} matches no tensor of the base or the experts",
                    "leave the pattern out, or see `bmm inspect` for the names",
                )
        tasks = _task_names(opened[1:], task_names)
        labels = [_label(f"expert {t!r}", e) for t, e in zip(tasks, opened[1:], strict=True)]
        aligned, views, notices = align_vocabularies(start, opened[1:], labels, vocabulary)
        kept: Heads = {}
        if heads != "refuse":
            views, kept, more = separate_heads(aligned, views, tasks)
            notices += more
        pool = cls(aligned, views, tasks)
        pool._stored_as, pool._notices = stored_as, notices
        pool.heads = kept if heads == "keep" else {}
        return pool

    def open_model(self, path: str | Path, skip: Sequence[str] = ()) -> Checkpoint:
        """A further model of this base, full or an adapter."""
        return open_model(path, self.base, skip, self._stored_as)

    @property
    def notices(self) -> list[str]:
        """What the opened models give reason to say, such as an adapter that names another base."""
        opened = [source for source in self.experts if isinstance(source, Checkpoint)]
        return [*(notice for source in opened for notice in source.notices), *self._notices]

    def __len__(self) -> int:
        """T, the number of experts."""
        return len(self.experts)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All names to process, sorted: every name of the base but the `aliases`, so that a tied weight counts once."""
        return tuple(sorted(name for name in self.base if name not in self.aliases))

    @cached_property
    def float_names(self) -> tuple[str, ...]:
        """Those of `names` that are floating, sorted. These are merged."""
        return tuple(name for name in self.names if self.info(name).floating)

    @cached_property
    def other_names(self) -> tuple[str, ...]:
        """Those of `names` that are integer or bool buffers, sorted. These are the base's."""
        return tuple(name for name in self.names if not self.info(name).floating)

    def info(self, name: str) -> TensorInfo:
        """Shape, and dtype in the base."""
        return info_of(self.base, name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, the same in base and experts."""
        return self.info(name).shape

    def task_vectors(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """``(T, *shape)``: every expert's weight minus the base's, subtracted in ``dtype``, on the base's device."""
        if name not in self.base:
            raise CheckpointError(f"no tensor {name!r} in the base", did_you_mean(name, self.names))
        if not self.info(name).floating:
            raise CheckpointError(f"{name!r} is no floating tensor", "integer and bool buffers come from the base")
        base = self.base[name].detach().to(dtype)
        vectors = torch.empty((len(self), *base.shape), dtype=dtype, device=base.device)  # (T, *shape)
        for vector, expert in zip(vectors, self.experts, strict=True):
            torch.sub(expert[name].detach().to(vector), base, out=vector)
        return vectors

    def with_ties(self, tensors: Mapping[str, Value]) -> dict[str, Value]:
        """``tensors`` with each tied name standing for the same value as its first name, where that is present."""
        added = {alias: tensors[name] for alias, name in self.aliases.items() if name in tensors}
        return {**tensors, **added}

    def fingerprint(self) -> str:
        """SHA-256 over the base's and the experts' weights in order; reads everything once, then remembers."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        prints = [fingerprint_of(source) for source in (self.base, *self.experts)]
        return hashlib.sha256("\n".join(["bmm pool 1", *prints]).encode()).hexdigest()

    def stamp(self) -> str:
        """SHA-256 over paths, sizes and modification times of all weight files: tells edited checkpoints apart without
        reading them. Empty where a model is in memory or put together from several files."""
        sources = [source.source if isinstance(source, TiedView) else source for source in (self.base, *self.experts)]
        if not all(type(source) is Checkpoint for source in sources):
            return ""
        stamps = [source.stamp() for source in sources if isinstance(source, Checkpoint)]
        return hashlib.sha256("\n".join(["bmm stamp 1", *stamps]).encode()).hexdigest()

    def refuse_expert(self, folder: Path) -> None:
        """Raise `WriteError` where a merge would be written over one of its experts."""
        if folder.resolve() in [source.path.resolve() for source in self.experts if isinstance(source, Checkpoint)]:
            raise WriteError(f"{folder} is one of the experts", "choose another output folder")

    def check_finite(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every floating tensor once; `CheckpointError` naming checkpoint and tensor at the first NaN or Inf.

        ``progress`` is called with (tensors done, tensors in all) after each.
        """
        labels = ["the base", *(f"expert {task!r}" for task in self.tasks)]
        total, done = len(labels) * len(self.float_names), 0
        for what, source in zip(labels, (self.base, *self.experts), strict=True):
            for name in self.float_names:
                tensor = source[name]
                if not all_finite(tensor):
                    nans = int(torch.isnan(tensor).sum())
                    infs = int(torch.isinf(tensor).sum())
                    raise CheckpointError(
                        f"{_label(what, source)}: {name!r} holds {nans} NaN and {infs} Inf of {tensor.numel()} values",
                        "leave this checkpoint out, or use one saved before its training diverged",
                    )
                done += 1
                if progress is not None:
                    progress(done, total)


def fingerprint_of(source: Mapping[str, Tensor]) -> str:
    """SHA-256 over the content of a model's tensors, remembered by checkpoints."""
    return source.fingerprint() if isinstance(source, Checkpoint) else fingerprint_tensors(source)


def _label(what: str, source: Mapping[str, Tensor]) -> str:
    """ "expert 'cars' (runs/cars)" where the source lies on disk."""
    inner = source.source if isinstance(source, TiedView) else source
    return f"{what} ({inner.path})" if isinstance(inner, Checkpoint) else what


def _task_names(experts: Sequence[Mapping[str, Tensor]], names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        found = [_own_name(expert.path) for expert in experts if isinstance(expert, Checkpoint)]
        if len(set(found)) == len(experts):
            return tuple(found)
        return tuple(f"expert{number}" for number in range(1, len(experts) + 1))
    if len(names) != len(experts):
        raise CheckpointError(f"{len(names)} task names for {len(experts)} experts", "give one name for each expert")
    if len(set(names)) != len(names):
        raise CheckpointError(f"task names are not unique: {', '.join(names)}", "give each expert its own name")
    return tuple(names)


def _own_name(path: Path) -> str:
    path = path.absolute()
    return path.name if path.is_dir() else path.stem
