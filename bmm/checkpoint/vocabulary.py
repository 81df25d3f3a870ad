"""Experts whose embeddings have other rows than the base's, brought to common rows by token.

Rows beyond a tokenizer's tokens are padding and belong to nobody: the base's stay as they are. Where an expert lacks a
token, its row is the base's, so that its task vector is zero there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError, VocabularyError
from .formats import TensorFile, some
from .low_rank import AdaptedFile, Change, Stored
from .reader import Checkpoint
from .tied import role_of
from .tokens import Tokens, extended_files, other_pieces, read_tokens, same_files
from .views import Extended, Reordered, View

VOCABULARIES = ("refuse", "rows", "base", "union")
"""What is done where tokens differ: stop, go by row number, keep the base's tokens, or take in the experts' too."""


def align_vocabularies(
    base: Checkpoint, experts: Sequence[Checkpoint], labels: Sequence[str], how: str = "refuse"
) -> tuple[Checkpoint, list[Checkpoint], list[str]]:
    """Base and experts with the same tokens in the same rows, and notices of padding that was left out.

    union: a token that the base lacks gets a row after the base's tokens; the base's own row there is the mean over the
    experts that know it, so that with one of them it is exactly its. Only added tokens can be taken in: those of a
    tokenizer's model come with merge rules or scores.

    Raises `CheckpointError` that counts and names the tokens for ``how`` "refuse", where rows differ and no tokenizer
    says why, or where "rows" finds another number of them.
    """
    found = [n for n in base.names if role_of(n) == "input" and len(base.info(n).shape) == 2]
    if not found:
        return base, list(experts), []
    embedding = max(found, key=lambda n: base.info(n).shape[0])
    count = base.info(embedding).shape[0]
    seen = [_Expert.of(base, e, label, embedding, count, how) for e, label in zip(experts, labels, strict=True)]
    notices = [f"{e.label}: {e.count} rows of embeddings for {count}; only padding differs"
               for e in seen if e.differs and not e.difference]  # fmt: skip
    if not any(e.differs for e in seen):
        return base, list(experts), []
    if how == "refuse":
        _refuse([e for e in seen if e.difference])
    names = [n for n in base.names if _indexed(base, n, count, seen)]
    new = _new_tokens(seen, count) if how == "union" else {}
    rows = max([count, *(row + 1 for row, _ in new.values())])
    changes = {n: _base_change(base, n, count, rows, new, seen) for n in names}
    start = base if not new else _extended(base, experts, changes, new, rows)
    return start, [e.view(start, names, changes, count, rows, new) for e in seen], notices


@dataclass(frozen=True)
class _Expert:
    """An expert's rows: how many, and whose they are where that is known and not as in the base."""

    checkpoint: Checkpoint
    label: str
    count: int
    tokens: Tokens | None
    base_tokens: Tokens | None
    differs: bool
    difference: str

    @classmethod
    def of(
        cls, base: Checkpoint, expert: Checkpoint, label: str, embedding: str, count: int, how: str
    ) -> _Expert:  # fmt: skip
        own = expert.info(embedding).shape[0] if embedding in expert else count
        same = same_files(base, expert)
        if (own == count and same) or how == "rows":
            if own != count:
                raise VocabularyError(
                    f"{label} has {own} rows of embeddings, the base {count}: vocabulary: rows cannot pair them",
                    "use vocabulary: base or union, which go by token",
                )
            return cls(expert, label, own, None, None, False, "")
        ours, theirs = read_tokens(base), read_tokens(expert)
        if ours is None or theirs is None:
            if own == count:
                if name := other_pieces(base, expert):
                    raise VocabularyError(
                        f"{label}: {name} is not the base's, and no tokenizer.json says which token has which row",
                        "put tokenizer.json into both folders, or pair by row number with vocabulary: rows",
                    )
                return cls(expert, label, own, None, None, False, "")
            whose = "the base" if ours is None else label
            raise CheckpointError(
                f"{label} has {own} rows of embeddings, the base {count} ({embedding}), and {whose} has no tokenizer "
                "to say which tokens they are",
                "put tokenizer.json (or vocab.json, vocab.txt) into both folders, or use experts of this base",
            )
        difference = _difference(ours, theirs, count, own)
        return cls(expert, label, own, theirs, ours, bool(difference) or own != count, difference)

    def view(
        self, base: Checkpoint, names: Iterable[str], changes: Mapping[str, Change], count: int, rows: int,
        new: Mapping[str, tuple[int, Mapping[str, object]]],
    ) -> Checkpoint:  # fmt: skip
        """This expert in the base's rows."""
        if not self.differs and not new:
            return self.checkpoint
        own = self._rows(count, rows, new)
        holders: dict[str, TensorFile] = {n: self.checkpoint.holder(n) for n in self.checkpoint.names}
        reordered = {}
        for name in names:
            if name in self.checkpoint and _row_axis(self.checkpoint.info(name).shape, self.count) is not None:
                stored = Stored(holders[name], name)
                reordered[name] = Reordered(stored, own, changes[name], changes[name].info.shape)
        file = AdaptedFile(self.checkpoint.path, reordered)
        salt = [[n, *c.described()] for n, c in sorted(reordered.items())]
        return View(self.checkpoint, holders | dict.fromkeys(reordered, file), salt, [base])

    def _rows(self, count: int, rows: int, new: Mapping[str, tuple[int, Mapping[str, object]]]) -> Tensor:
        """For each row of the result the expert's, or -1 for the base's, (rows,)."""
        own = torch.full((rows,), -1, dtype=torch.int64)
        if self.tokens is None or self.base_tokens is None:
            own[:count] = torch.arange(count)
            for row, _ in new.values():
                own[row] = -1
            return own
        wanted = dict(self.base_tokens.rows) | {token: row for token, (row, _) in new.items()}
        for token, row in wanted.items():
            theirs = self.tokens.rows.get(token, self.count)
            if row < rows and theirs < self.count:
                own[row] = theirs
        return own


def _difference(ours: Tokens, theirs: Tokens, rows: int, count: int) -> str:
    """What differs between the tokens of the base, with ``rows`` embeddings, and those of an expert with ``count``:
    counted and named; "" where nothing does."""
    extra = [f"{t!r} (row {r})" for t, r in theirs.rows.items() if t not in ours.rows and r < count]
    gone = [f"{t!r} (row {r})" for t, r in ours.rows.items() if r < rows and theirs.rows.get(t, count) >= count]
    common = [(t, ours.rows[t], r) for t, r in theirs.rows.items() if t in ours.rows and r < count]
    moved = [f"{token!r} (row {here}, there {there})" for token, here, there in common if here != there]
    kinds = ((extra, "tokens the base lacks"), (gone, "tokens it lacks"), (moved, "tokens in another row"))
    return "; ".join(f"{len(items)} {what}: {some(items)}" for items, what in kinds if items)


def _refuse(experts: Sequence[_Expert]) -> None:
    for expert in experts:
        raise VocabularyError(
            f"{expert.label}: another vocabulary than the base's: {expert.difference}",
            "vocabulary: base keeps the base's tokens, union takes in the others, rows goes by row number",
        )


def _row_axis(shape: tuple[int, ...], count: int) -> int | None:
    """The axis that runs over ``count`` rows: the first, or the second of a (1, count) bias."""
    if shape and shape[0] == count:
        return 0
    return 1 if len(shape) == 2 and shape == (1, count) else None


def _indexed(base: Checkpoint, name: str, count: int, experts: Sequence[_Expert]) -> bool:
    """Whether a tensor of the base has a row a token."""
    shape = base.info(name).shape
    if _row_axis(shape, count) is None or not base.info(name).floating:
        return False
    if role_of(name) or (name.endswith("bias") and base.info(name).numel == count):
        return True
    others = (e for e in experts if e.count != count and name in e.checkpoint)
    return any(_row_axis(e.checkpoint.info(name).shape, e.count) is not None for e in others)


def _new_tokens(experts: Sequence[_Expert], count: int) -> dict[str, tuple[int, Mapping[str, object]]]:
    """Tokens that the base lacks: their rows, after the base's last token, and what their tokenizers say of them."""
    base = next(e.base_tokens for e in experts if e.base_tokens is not None)
    row, new = max(base.rows.values(), default=-1) + 1, dict[str, tuple[int, Mapping[str, object]]]()
    for expert in experts:
        rows = expert.tokens.rows if expert.tokens is not None else {}
        fresh = [t for t, r in rows.items() if t not in base.rows and r < expert.count]
        assert not fresh or expert.tokens is not None
        inner = [t for t in fresh if expert.tokens is not None and t not in expert.tokens.added]
        if inner:
            raise CheckpointError(
                f"{expert.label}: {len(inner)} tokens of the tokenizer's own model are not in the base: "
                f"{some(map(repr, inner))}",
                "only added tokens can be taken in: use vocabulary: base",
            )
        for token in sorted(fresh, key=rows.__getitem__):
            if token not in new and expert.tokens is not None:
                new[token] = (row + len(new), expert.tokens.added[token])
    if new and row > count:
        raise CheckpointError(
            f"the base's tokenizer has a token in row {row - 1}, its embedding {count} rows",
            "put the tokenizer of this base into its folder, or use vocabulary: base",
        )
    return new


def _base_change(
    base: Checkpoint, name: str, count: int, rows: int, new: Mapping[str, tuple[int, Mapping[str, object]]],
    experts: Sequence[_Expert],
) -> Change:  # fmt: skip
    own = Stored(base.holder(name), name)
    if not new:
        return own
    axis = _row_axis(own.info.shape, count)
    shape = tuple(rows if k == axis else size for k, size in enumerate(own.info.shape))
    sources: dict[int, list[tuple[Stored, int]]] = {}
    for token, (row, _) in new.items():
        sources[row] = [
            (Stored(e.checkpoint.holder(name), name), e.tokens.rows[token])
            for e in experts
            if e.tokens is not None and name in e.checkpoint and e.tokens.rows.get(token, e.count) < e.count
        ]
    return Extended(own, {row: found for row, found in sources.items() if found}, shape)


def _extended(
    base: Checkpoint, experts: Sequence[Checkpoint], changes: Mapping[str, Change],
    new: Mapping[str, tuple[int, Mapping[str, object]]], rows: int,
) -> View:  # fmt: skip
    """The base with rows for the new tokens, and with tokenizer and configuration to match."""
    holders: dict[str, TensorFile] = {n: base.holder(n) for n in base.names}
    config = dict(base.config)
    for part in (config, *(config[k] for k in ("text_config", "decoder", "llm_config") if k in config)):
        if isinstance(part, dict) and isinstance(part.get("vocab_size"), int):
            part["vocab_size"] = rows
    salt = [[n, *c.described()] for n, c in sorted(changes.items())]
    file = AdaptedFile(base.path, changes)
    files = extended_files(base, new)
    return View(base, holders | dict.fromkeys(changes, file), [salt, list(new)], experts, config, files)
