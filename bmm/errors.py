"""What can go wrong, said so that the user knows what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BmmError(Exception):
    """Base of every error a user can cause or cure: one line of what and where, one line of what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class CheckpointError(BmmError):
    """A checkpoint cannot be read, is damaged, or does not agree with the others."""


class VocabularyError(CheckpointError):
    """The tokens of two checkpoints are not the same, or not in the same rows."""


class WriteError(BmmError):
    """A result cannot be written."""


class MergeError(BmmError):
    """A merge was asked for that the method, its knobs or its inputs do not allow."""


class GramError(BmmError):
    """Activation statistics are missing, damaged or do not fit the model."""


class RecipeError(BmmError):
    """A recipe, an option or a task definition is wrong."""


class StudyError(BmmError):
    """A study cannot be opened, continued or read."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint naming the closest known words, or all of them where none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.55)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
