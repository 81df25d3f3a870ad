"""Inputs held whole whose rows are padded to the longest of all, and batches of them that are no wider than need be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Padded(dict[str, Tensor]):
    """Keyword inputs (n, ..., tokens) with padding at either end of the last axis.

    ``masks`` names the tensors that each mask tells the tokens of (it is not 0 there), the mask itself among them. Rows
    taken from it are cut to the longest of them.
    """

    def __init__(self, tensors: Mapping[str, Tensor], masks: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__(tensors)
        self.masks = dict(masks)

    def __reduce__(self) -> Any:
        return type(self), (dict(self), self.masks)

    def rows(self, index: Tensor | slice) -> Padded:
        """Some of the rows, cut to the tokens of the longest."""
        found = {name: tensor[index] for name, tensor in self.items()}
        for mask, names in self.masks.items():
            there = (found[mask] != 0).flatten(0, -2).any(0).nonzero()  # (columns with a token, 1)
            if len(there):
                first, last = int(there[0]), int(there[-1]) + 1
                found |= {name: found[name][..., first:last].contiguous() for name in names}
        return Padded(found, self.masks)

    def by_length(self, size: int) -> Iterator[Tensor]:
        """The numbers of all rows, ``size`` at a time, the longest first: those of a batch are of like length."""
        lengths = [(self[mask] != 0).sum(-1).reshape(len(self[mask]), -1).amax(1) for mask in self.masks]  # (n,) each
        order = torch.stack(lengths).sum(0).argsort(descending=True, stable=True)
        yield from order.split(size)


def taken(inputs: Any, index: Tensor | slice) -> Any:
    """Some inputs of a batch, or of inputs held whole."""
    if isinstance(inputs, Padded):
        return inputs.rows(index)
    if isinstance(inputs, Mapping):
        return {name: tensor[index] for name, tensor in inputs.items()}
    return inputs[index]
