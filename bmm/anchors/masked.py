"""Masked models: one unified task vector, and for every task a bit a parameter that says which of it to use.

    W_t ~ W_0 + lambda_t * m_t * tau_uni

EMR (arXiv 2405.17461): tau_uni is the elected vector of `emr`, m_t where tau_t agrees with it in sign, and the rescaler
lambda_t = sum |tau_t| / sum |m_t tau_uni| over the whole model keeps the task's mean magnitude. (The released code adds
up means of tensors in place of entries, which gives a bias as much weight as a matrix; this is the paper's equation 4.)

TALL masks (arXiv 2405.07813): tau_uni is the sum of task vectors, m_t where |tau_t| >= mask_strength |tau_uni - tau_t|,
and lambda_t = 1.

Storage is the base, one more model, and T bits a parameter, in place of T models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..checkpoint.masked import open_masked, write_masked
from ..checkpoint.writer import MAX_SHARD_BYTES
from ..errors import MergeError, did_you_mean
from ..notation import StateDict, Tensors
from .streaming import narrow


@dataclass(frozen=True, eq=False)
class MaskedModels:
    """T models in the space of two; made by `compress.emr_compress`, `compress.tall_compress` or `load`.

    ``method`` is "emr" or "tall", ``tasks`` the T names. ``vector``: the unified task vector by name, float32 or wider;
    ``masks``: uint8 (T, ceil(n / 8)) by the same names, bits in the order of `numpy.packbits`. Names without a mask
    (integer buffers, empty tensors) are the base's in every model. ``rescalers``: lambda_t. ``tied``: name -> earlier
    name of the base that is the same parameter.
    """

    method: str
    tasks: tuple[str, ...]
    base: Tensors
    vector: Tensors
    masks: Tensors
    rescalers: tuple[float, ...]
    tied: Mapping[str, str] = field(default_factory=dict)

    def mask(self, task: str, name: str) -> Tensor:
        """Where a task uses the unified vector: booleans in the shape of the parameter ``name``."""
        return self._bits(task, name, self.base[name].shape)

    def reconstruct(self, task: str, dtype: torch.dtype | None = None) -> StateDict:
        """The model of one task, in memory; see `stream`."""
        return dict(self.stream(task, dtype))

    def stream(self, task: str, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of one task's model in base order, floating tensors in ``dtype``, the base's by default.

        Raises `MergeError` for a task that is not here.
        """
        scale = self.rescalers[self._index(task)]
        return self._apply(lambda name, vector: scale * self._bits(task, name, vector.shape) * vector, dtype)

    def unified(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the unified model, W_0 + tau_uni."""
        return self._apply(lambda name, vector: vector, dtype)

    def bits(self) -> dict[str, int]:
        """What storing this takes, in bits: ``base`` and ``unified`` at the base's precision, ``masks``,
        ``rescalers``; ``total`` is their sum, ``experts`` what T models of their own take."""
        held = [(name, self.base[name]) for name in self.base if name not in self.tied]
        base = sum(8 * tensor.numel() * tensor.itemsize for _, tensor in held)
        masked = [tensor for name, tensor in held if name in self.masks]
        parts = {
            "base": base,
            "unified": sum(8 * tensor.numel() * tensor.itemsize for tensor in masked),
            "masks": sum(tensor.numel() for tensor in masked) * len(self.tasks),
            "rescalers": 64 * len(self.tasks),
        }
        return parts | {"total": sum(parts.values()), "experts": base * len(self.tasks)}

    def save(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        extra_files: Mapping[str, str | bytes] | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the unified model as a checkpoint, and the masks next to it; `load` reads both back.

        The vector is stored as W_0 + tau_uni in the base's dtype (or ``dtype``), as experts are, so that what `load`
        reconstructs is off by that dtype's rounding of the weights: 2^-9 of them in bfloat16.

        Raises `MergeError` where the base is not a checkpoint on disk, which the folder could refer to; `WriteError`.
        """
        if not isinstance(self.base, Checkpoint):
            raise MergeError("the base is not a checkpoint on disk", "open it with bmm.checkpoint.open_checkpoint")
        return write_masked(
            folder,
            self.unified(dtype),
            {name: self.masks[name] for name in self.masks},
            method=self.method,
            tasks=self.tasks,
            rescalers=self.rescalers,
            base=self.base,
            tied=[(first, name) for name, first in self.tied.items()],
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            extra_files=extra_files,
            overwrite=overwrite,
        )

    @classmethod
    def load(cls, folder: str | Path, base: str | Path | Checkpoint | None = None) -> MaskedModels:
        """Open a folder that `save` wrote, with the base it names or ``base``; raises `CheckpointError`."""
        found = open_masked(folder, base)
        tied = {name: group[0] for group in found.base.tied for name in group[1:]}
        vector = _Difference(found.unified, found.base, found.masks.names)
        return cls(found.method, found.tasks, found.base, vector, found.masks, found.rescalers, tied)

    def _index(self, task: str) -> int:
        if task not in self.tasks:
            raise MergeError(f"no task {task!r} here", did_you_mean(task, self.tasks))
        return self.tasks.index(task)

    def _bits(self, task: str, name: str, shape: torch.Size) -> Tensor:
        bits = np.unpackbits(self.masks[name][self._index(task)].numpy(), count=shape.numel())
        return torch.from_numpy(bits.astype(bool)).reshape(shape)

    def _apply(self, part: Callable[[str, Tensor], Tensor], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """W_0 plus ``part(name, tau_uni)``, clamped to the range of the dtype it is stored in."""
        done: StateDict = {}
        for name in self.base:
            if name in self.tied:
                yield name, done[self.tied[name]]
                continue
            stored = self.base[name].detach()
            if name in self.masks:
                vector = self.vector[name]
                merged = narrow(stored.to(vector) + part(name, vector), dtype or stored.dtype)
            else:
                merged = stored.to(dtype or stored.dtype) if stored.is_floating_point() else stored.clone()
            if name in self.tied.values():
                done[name] = merged
            yield name, merged


class _Difference(Mapping[str, Tensor]):
    """The unified task vector as the difference of two models on disk."""

    def __init__(self, unified: Tensors, base: Tensors, names: Iterable[str]) -> None:
        self._unified, self._base, self._names = unified, base, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        unified, base = self._unified[name], self._base[name]
        wide = torch.promote_types(torch.promote_types(unified.dtype, base.dtype), torch.float32)
        return unified.to(wide) - base.to(wide)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
