"""Which token each embedding row belongs to, from the tokenizer files in a checkpoint's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .formats import read_json, reason, some
from .reader import Checkpoint

FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "added_tokens.json", "tokenizer_config.json")
PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""Files of SentencePiece, which are compared but not read: models differ in how they number its pieces."""


MOST_ROWS = 2**31
"""Row numbers stay below this, as torch's indices and every tokenizer's do."""


@dataclass(frozen=True)
class Tokens:
    """Token -> row. ``added`` holds what a tokenizer says of tokens outside its model, by token."""

    rows: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]


def read_tokens(checkpoint: Checkpoint) -> Tokens | None:
    """The tokens of a checkpoint's folder, None where it has no tokenizer.json, vocab.json or vocab.txt.

    Raises `CheckpointError` for a damaged file, or one that gives two tokens the same row.
    """
    files = _files(checkpoint, FILES)
    if "tokenizer.json" in files:
        rows, added = _from_tokenizer(files["tokenizer.json"])
    elif "vocab.json" in files or "vocab.txt" in files:
        rows, added = _from_vocabulary(files)
    else:
        return None
    path = next(iter(files.values())).parent
    odd = [token for token, row in rows.items() if type(row) is not int or not 0 <= row < MOST_ROWS]
    if odd:
        shown = some(repr(token)[:40] for token in odd)
        raise CheckpointError(f"{path}: the tokenizer has tokens without a row number: {shown}", _AGAIN)
    if len(set(rows.values())) != len(rows):
        raise CheckpointError(f"{path}: the tokenizer gives two tokens the same row", _AGAIN)
    try:
        "".join(rows).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{path}: the tokenizer has tokens that are no text", _AGAIN) from None
    return Tokens(rows, added)


def same_files(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether two checkpoints have the same tokenizer files, byte by byte (or none)."""
    ours, theirs = (_files(c, (*FILES[:4], *PIECES)) for c in (a, b))
    return ours.keys() == theirs.keys() and all(_equal(ours[n], theirs[n]) for n in ours)


def other_pieces(a: Checkpoint, b: Checkpoint) -> str:
    """The name of a SentencePiece file that both checkpoints have and that is not the same in them, "" for none."""
    ours, theirs = (_files(c, PIECES) for c in (a, b))
    return next((n for n in ours if n in theirs and not _equal(ours[n], theirs[n])), "")


def _files(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, Path]:
    return {file.name: file for file in checkpoint.side_files() if file.name in names}


def _equal(a: Path, b: Path) -> bool:
    try:
        return a == b or a.read_bytes() == b.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({reason(error)})", _AGAIN) from None


def extended_files(base: Checkpoint, new: Mapping[str, tuple[int, Mapping[str, Any]]]) -> dict[str, bytes]:
    """The base's tokenizer files with further added tokens: token -> (row, what its own tokenizer says of it)."""
    files = _files(base, FILES)
    out: dict[str, Any] = {}
    if "tokenizer.json" in files:
        out["tokenizer.json"] = tokenizer = read_json(files["tokenizer.json"], "tokenizer")
        tokenizer["added_tokens"] = [
            *_added_tokens(files["tokenizer.json"], tokenizer),
            *({**_PLAIN, **said, "id": row, "content": token} for token, (row, said) in new.items()),
        ]
    if "added_tokens.json" in files or "tokenizer.json" not in files:
        known = read_json(files["added_tokens.json"], "list of tokens") if "added_tokens.json" in files else {}
        out["added_tokens.json"] = known | {token: row for token, (row, _) in new.items()}
    if "tokenizer_config.json" in files:
        config = read_json(files["tokenizer_config.json"], "tokenizer configuration")
        if isinstance(config.get("added_tokens_decoder"), dict):
            said = {str(row): {**_PLAIN, **_without_id(s), "content": t} for t, (row, s) in new.items()}
            out["tokenizer_config.json"] = config | {"added_tokens_decoder": config["added_tokens_decoder"] | said}
    return {name: _text(base, name, content) for name, content in out.items()}


def _text(base: Checkpoint, name: str, content: Any) -> bytes:
    try:
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise CheckpointError(f"{base.path / name}: cannot be written again ({reason(error)})", _AGAIN) from None


_AGAIN = "save the tokenizer again with transformers"
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def _without_id(said: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in said.items() if key != "id"}


def _from_tokenizer(path: Path) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
    raw = read_json(path, "tokenizer")
    model = raw.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    added: dict[str, Mapping[str, Any]] = {}
    for entry in _added_tokens(path, raw):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            raise CheckpointError(f"{path}: an added token without its text: {repr(entry)[:60]}", _AGAIN)
        added[entry["content"]] = entry
    if isinstance(vocabulary, list):  # Unigram: [token, score] in order of rows
        if not all(isinstance(entry, list) and entry and isinstance(entry[0], str) for entry in vocabulary):
            raise CheckpointError(f"{path}: the vocabulary is no list of tokens with scores", _AGAIN)
        rows = {entry[0]: row for row, entry in enumerate(vocabulary)}
    elif isinstance(vocabulary, Mapping):
        rows = dict(vocabulary)
    else:
        raise CheckpointError(f"{path}: no vocabulary in the tokenizer", _AGAIN)
    return rows | {token: entry.get("id") for token, entry in added.items()}, added


def _added_tokens(path: Path, raw: Mapping[str, Any]) -> list[Any]:
    found = raw.get("added_tokens")
    if found is not None and not isinstance(found, list):
        raise CheckpointError(f"{path}: added_tokens is {repr(found)[:60]}, not a list", _AGAIN)
    return found or []


def _from_vocabulary(files: Mapping[str, Path]) -> tuple[dict[str, int], dict[str, Mapping[str, Any]]]:
    if "vocab.json" in files:
        rows: dict[str, int] = dict(read_json(files["vocab.json"], "vocabulary"))
    else:
        try:
            lines = files["vocab.txt"].read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{files['vocab.txt']}: cannot be read ({reason(error)})", "save it again") from None
        rows = {token.rstrip("\r"): row for row, token in enumerate(lines) if token}
    further = read_json(files["added_tokens.json"], "list of tokens") if "added_tokens.json" in files else {}
    return rows | further, {token: {"special": False} for token in further}
