"""Whether models share one vocabulary, told from the tokenizer files in their folders."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..checkpoint.layout import inside
from ..errors import CheckpointError

FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")


def require_one_vocabulary(base: Path, others: Iterable[Path], key: str) -> None:
    """Raise `CheckpointError` where a folder's tokenizer has other tokens than the base's, or others in other rows.

    Folders without tokenizer files say nothing; their tensors must agree in shape all the same.
    """
    for other in others:
        for name in FILES:
            both = (base / name).is_file() and (other / name).is_file()
            if both and _vocabulary(base, name) != _vocabulary(other, name):
                raise CheckpointError(
                    f"{other}: {name} has other tokens than {base}'s, and {key} asks for one vocabulary",
                    "rows of the embeddings would not fit each other: use models with one tokenizer",
                )


def _vocabulary(folder: Path, name: str) -> Any:
    """What of a tokenizer file says which token has which row."""
    path = inside(folder, name)
    try:
        raw = path.read_bytes()
        if name != "tokenizer.json":
            return raw
        found = json.loads(raw)
        added = [(token.get("id"), token.get("content")) for token in found.get("added_tokens") or []]
        return found["model"].get("vocab"), sorted(added, key=repr)
    except (OSError, ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: no tokenizer that can be read ({error})", "download it again") from None
