"""Whether base and experts are the same model: names, shapes, floating kinds and ties, and what to do if not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError
from .formats import TensorInfo, some
from .reader import Checkpoint
from .tied import Groups, shared_groups


class TiedView(Mapping[str, Tensor]):
    """An expert seen through the base's names: one may store a tied weight once and the other twice, and buffers may be
    the base's."""

    def __init__(
        self, source: Mapping[str, Tensor], stored_as: Mapping[str, str], base: Mapping[str, Tensor] | None = None
    ) -> None:
        self.source = source
        self.stored_as = dict(stored_as)
        """The base's names -> the names under which ``source`` stores them; others are read from ``base``."""
        self.base = base

    def place(self, name: str) -> tuple[Mapping[str, Tensor], str]:
        """The mapping that holds a tensor, and its name there."""
        if name in self.stored_as:
            return self.source, self.stored_as[name]
        if self.base is None or name not in self.base:
            raise KeyError(name)
        return self.base, name

    def __getitem__(self, name: str) -> Tensor:
        source, stored = self.place(name)
        return source[stored]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored_as if self.base is None else self.base)

    def __len__(self) -> int:
        return len(self.stored_as if self.base is None else self.base)


def on_disk(source: Mapping[str, Tensor], name: str) -> tuple[Checkpoint, str] | None:
    """The checkpoint that holds a tensor and the name it has there; None where it is in memory."""
    if isinstance(source, TiedView):
        return on_disk(*source.place(name))
    return (source, name) if isinstance(source, Checkpoint) else None


def info_of(source: Mapping[str, Tensor], name: str) -> TensorInfo:
    """Shape and dtype of one tensor, without reading it where the source is on disk."""
    if isinstance(source, Checkpoint):
        return source.info(name)
    if isinstance(source, TiedView):
        return info_of(*source.place(name))
    return TensorInfo.of(source[name])


def ties_of(source: Mapping[str, Tensor]) -> Groups:
    """Groups of names that are one parameter of ``source``."""
    return source.tied if isinstance(source, Checkpoint) else shared_groups(source)


def require_tensors(source: Mapping[str, Tensor], label: str) -> None:
    """Raise `CheckpointError` unless an in-memory ``source`` maps text to dense tensors."""
    if isinstance(source, Checkpoint):
        return
    if not isinstance(source, Mapping) or not source:
        raise CheckpointError(f"{label} is no mapping of tensors by name", "give a checkpoint or a state_dict")
    for name, value in source.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise CheckpointError(f"{label}: {name!r} is no dense tensor", "give a model's state_dict")
        if value.is_complex() or value.is_quantized:
            raise CheckpointError(f"{label}: {name!r} has unsupported dtype {value.dtype}", "convert it first")


def align(
    base: Mapping[str, Tensor], base_ties: Groups, expert: Mapping[str, Tensor], label: str
) -> Mapping[str, Tensor]:
    """``expert`` under exactly the base's names, or a `CheckpointError` that counts and names what differs.

    A tied weight may be stored once on one side and under each of its names on the other; that is no difference. Nor
    are integer buffers (position ids, say) that one side saves and the other does not: a merge takes the base's.
    """
    missing = set(base) - set(expert)
    extra = set(expert) - set(base)
    stored_as = {name: name for name in base if name in expert}
    for name in sorted(missing):
        for other in _tied_with(name, base_ties):
            if other in expert:
                stored_as[name] = other
    if extra:
        extra -= {name for name in extra if any(other in base for other in _tied_with(name, ties_of(expert)))}
    absent = missing - set(stored_as)
    buffers = {name for name in absent if not info_of(base, name).floating}
    extra -= {name for name in extra if info_of(expert, name).dtype == torch.int64}  # quantised weights never are
    _require_agreement(base, expert, stored_as, sorted(absent - buffers), sorted(extra), label)
    _require_ties(base_ties, expert, label)
    if set(expert) == set(base):
        return expert
    return TiedView(expert, {n: stored_as[n] for n in base if n not in buffers}, base if buffers else None)


def _tied_with(name: str, groups: Groups) -> list[str]:
    return [other for group in groups if name in group for other in group if other != name]


def _require_agreement(
    base: Mapping[str, Tensor],
    expert: Mapping[str, Tensor],
    stored_as: Mapping[str, str],
    missing: Sequence[str],
    extra: Sequence[str],
    label: str,
) -> None:
    shapes, kinds, differing = [], [], []
    for name, stored in sorted(stored_as.items()):
        ours, theirs = info_of(base, name), info_of(expert, stored)
        if ours.floating != theirs.floating:
            kinds.append(f"{name} base {_plain(ours)}, expert {_plain(theirs)}")
        elif ours.shape != theirs.shape:
            shapes.append(f"{name} base {ours.shape}, expert {theirs.shape}")
            differing.append(name)
    found = [
        f"{len(items)} {what}: {some(items)}"
        for items, what in (
            (missing, "missing"),
            (extra, "not in the base"),
            (shapes, "of another shape"),
            (kinds, "floating in one only"),
        )
        if items
    ]
    if found:
        hint = _prefix_hint(missing, extra) or _skip_hint([*missing, *extra, *differing]) or "use experts of this base"
        raise CheckpointError(f"{label} does not agree with the base: {'; '.join(found)}", hint)


def _require_ties(base_ties: Groups, expert: Mapping[str, Tensor], label: str) -> None:
    """A tie of the base must hold in the expert: merged once, an untied weight would be lost."""
    for group in base_ties:
        stored = [name for name in group if name in expert]
        for other in stored[1:]:
            if not torch.equal(expert[stored[0]], expert[other]):
                raise CheckpointError(
                    f"{label}: {stored[0]} and {other} are tied in the base but differ here",
                    "fine-tune with tied weights, or save the base with the two untied",
                )


def _plain(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def _prefix_hint(missing: Sequence[str], extra: Sequence[str]) -> str:
    """The cure where one side was saved from inside a wrapper: ``bert.encoder...`` against ``encoder...``."""
    for longer, shorter, whose in ((extra, missing, "expert"), (missing, extra, "base")):
        for prefix in sorted({name.partition(".")[0] + "." for name in longer}):
            stripped = {n.removeprefix(prefix) for n in longer if n.startswith(prefix)}
            if shorter and stripped >= set(shorter):
                return f"the {whose}'s names begin with {prefix!r}: save both from the same model class"
    return ""


def _skip_hint(names: Sequence[str]) -> str:
    """A ``skip`` that would leave out the names which differ, if that is a head or two and not the model."""
    patterns = sorted({_pattern(name) for name in names})
    if not 0 < len(patterns) <= 3:
        return ""
    quoted = ", ".join(f'"{pattern}"' for pattern in patterns)
    return f"if these belong to a head that is not to be merged: heads: base or keep, or skip: [{quoted}]"


def _pattern(name: str) -> str:
    return f"{name.rpartition('.')[0]}.*" if "." in name else name
