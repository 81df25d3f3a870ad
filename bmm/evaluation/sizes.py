"""How large a model a checkpoint can hold, so that config.json alone never decides how much memory is taken."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from ..checkpoint import open_checkpoint
from ..errors import CheckpointError, RecipeError

FACTOR = 2
SLACK = 2**24  # entries of buffers that are computed, not stored: masks, positions
_ON_THE_WAY = 16  # tied weights are registered several times before they are one
_MODULES = 10_000


@dataclass(frozen=True)
class Room:
    """What a folder's weight files hold: entries of all tensors, and how many tensors there are."""

    folder: Path
    entries: int
    tensors: int

    @classmethod
    def of(cls, folder: Path) -> Room | None:
        """From the headers alone; None for a folder without weights that can be read, which nothing is merged with."""
        try:
            stored = open_checkpoint(folder)
        except CheckpointError:
            return None
        return cls(folder, sum(stored.info(name).numel for name in stored), len(stored))

    @contextlib.contextmanager
    def bounding(self) -> Iterator[None]:
        """Stop a model that this thread builds on the meta device once it has far more parts than the files do:
        every layer takes memory in Python even where its tensors take none."""
        thread, entries, parts = threading.get_ident(), 0, 0

        def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
            nonlocal entries, parts
            if tensor is None or threading.get_ident() != thread:
                return
            entries, parts = entries + tensor.numel(), parts + 1
            if entries > _ON_THE_WAY * self.entries + SLACK or parts > _ON_THE_WAY * self.tensors + _MODULES:
                raise self._refused(f"over {entries:,} entries in {parts:,} tensors")

        hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def require(self, model: nn.Module) -> None:
        """Raise `RecipeError` for a model of more than `FACTOR` times the stored entries, and `SLACK`."""
        tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
        entries = sum(tensor.numel() for tensor in tensors)
        if entries > FACTOR * self.entries + SLACK:
            raise self._refused(f"{entries:,} entries")

    def _refused(self, what: str) -> RecipeError:
        return RecipeError(
            f"{self.folder / 'config.json'} asks for a model of {what}; the weights beside it have {self.entries:,} "
            f"in {self.tensors:,}",
            "download config.json again: it is another model's, or damaged",
        )
