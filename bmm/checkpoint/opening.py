"""A model by its path: a full checkpoint, or an adapter on the base it was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from .adapter_names import NameFinder
from .adapters import is_adapter, open_adapter
from .reader import Checkpoint, open_checkpoint


def open_model(
    path: str | Path,
    base: Mapping[str, Tensor] | None = None,
    skip: Sequence[str] = (),
    stored_as: NameFinder | None = None,
) -> Checkpoint:
    """Open a full model, or a PEFT adapter on ``base``; see `open_checkpoint` and `open_adapter`.

    Raises `CheckpointError` as they do, and for an adapter where ``base`` is no checkpoint on disk.
    """
    if not is_adapter(Path(path).expanduser()):
        return open_checkpoint(path, skip)
    if not isinstance(base, Checkpoint):
        raise CheckpointError(f"{path}: an adapter, which is no model without its base", "give it as an expert")
    return open_adapter(path, base, skip, stored_as)
