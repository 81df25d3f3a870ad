"""Fishers on disk, in the same checked cache as Grams, but read back one tensor at a time.

A Fisher is as large as the model: T of them must never have to be in memory together.
"""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import open_checkpoint
from ..grams.store import TensorStore, checked_body
from ..notation import Tensors


class FisherStore(TensorStore):
    """The Fisher cache in one folder."""

    what = "Fisher"

    def save(self, fingerprint: str, fisher: Tensors) -> Path:
        """Write a Fisher, replacing what is there in one step. Raises `WriteError` where that fails."""
        return self.write(fingerprint, fisher)

    def load(self, fingerprint: str) -> Tensors | None:
        """The Fisher of a fingerprint, reading from disk on access, or None where there is none to trust (`notices`).

        The whole file is read once here, tensor by tensor, for its checksum.
        """
        return self.read(fingerprint, _read)


def _read(path: Path, fingerprint: str) -> Tensors:
    fisher = open_checkpoint(path)
    checked_body(path, fingerprint, fisher)
    return fisher
