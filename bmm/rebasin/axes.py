"""Bookkeeping of a trace: which axes must be permuted together, and which must not be permuted at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Label:
    """An axis as blocks of ``width`` entries, one block for each unit of a class of axes."""

    node: int
    width: int = 1


Labels = list[Label | None]
"""One label an axis of a tensor; None: the order along this axis is fixed."""


class Axes:
    """Classes of axes (union-find). Joined axes share one permutation; pinned ones have none."""

    def __init__(self) -> None:
        self._parent: list[tuple[int, int]] = []  # node -> (node it was joined to, its units in a unit of that)
        self._size: list[int] = []
        self._fixed: list[bool] = []

    def new(self, size: int) -> Label:
        self._parent.append((len(self._parent), 1))
        self._size.append(size)
        self._fixed.append(False)
        return Label(len(self._parent) - 1)

    def find(self, label: Label) -> Label:
        """The class of a label, and the width of one of its units there."""
        node, width = label.node, label.width
        while self._parent[node][0] != node:
            node, factor = self._parent[node]
            width *= factor
        return Label(node, width)

    def pin(self, label: Label | None) -> None:
        """No permutation along this axis."""
        if label is not None:
            self._fixed[self.find(label).node] = True

    def join(self, a: Label | None, b: Label | None) -> Label | None:
        """Two axes that have to move together; blocks of different width are joined at the coarser one."""
        if a is None or b is None:
            self.pin(a)
            self.pin(b)
            return None
        a, b = self.find(a), self.find(b)
        if a.width < b.width:
            a, b = b, a  # b is the finer one
        if (a.node == b.node and a.width != b.width) or a.width % b.width:
            self.pin(a)
            self.pin(b)
        elif a.node != b.node:
            self._parent[b.node] = (a.node, a.width // b.width)
            self._fixed[a.node] |= self._fixed[b.node]
        return a

    def fixed(self, label: Label) -> bool:
        return self._fixed[self.find(label).node]

    def size(self, label: Label) -> int:
        """Units of a label's class."""
        return self._size[self.find(label).node]


class Labelling:
    """Labels of the tensors of a run. What was never labelled (an input, a constant) has a fixed order."""

    def __init__(self) -> None:
        self.axes = Axes()
        self._permanent: dict[int, Labels] = {}
        self._known: dict[int, Labels] = {}
        self._alive: list[Tensor] = []  # ids are unique only among the living

    def open(self, parameter: Tensor) -> Labels:
        """New labels for a parameter or buffer of the model; they outlive the run."""
        labels: Labels = [self.axes.new(n) if n > 1 else None for n in parameter.shape]
        self._permanent[id(parameter)] = labels
        self._alive.append(parameter)
        return labels

    def set(self, tensor: Tensor, labels: Labels) -> None:
        if id(tensor) not in self._permanent:
            self._alive.append(tensor)
            self._known[id(tensor)] = labels

    def forget(self) -> None:
        """Drop the tensors of a run."""
        self._known = {}
        self._alive = [t for t in self._alive if id(t) in self._permanent]

    def of(self, tensor: Tensor) -> Labels:
        return self._permanent.get(id(tensor)) or self._known.get(id(tensor)) or [None] * tensor.dim()

    def tie(self, tensor: Tensor | None, axis: int, label: Label | None) -> None:
        """Join one axis of a tensor, if there is one, with a label."""
        if tensor is not None:
            self.axes.join(self.of(tensor)[axis], label)

    def pin(self, tensor: Tensor, *axes: int) -> None:
        for axis in axes:
            self.axes.pin(self.of(tensor)[axis])

    def pin_all(self, value: Any) -> None:
        """Pin every axis of every tensor in a structure of them."""
        if isinstance(value, Tensor):
            for label in self.of(value):
                self.axes.pin(label)
        elif isinstance(value, Mapping):
            self.pin_all(list(value.values()))
        elif isinstance(value, list | tuple):
            for item in value:
                self.pin_all(item)


def reshaped(axes: Axes, labels: Labels, before: tuple[int, ...], after: tuple[int, ...]) -> Labels:
    """Labels of a row-major reshape. What cannot be followed is pinned.

    Axes are grouped where the products of the lengths agree. An axis keeps its label where it stays whole; merged
    with axes behind it (a channel with its pixels), it becomes wider blocks.
    """
    result: Labels = [None] * len(after)
    i = j = 0
    while i < len(before) or j < len(after):
        start_i, start_j = i, j
        ours = theirs = 1
        while i < len(before) or j < len(after):
            if ours <= theirs and i < len(before):
                ours *= before[i]
                i += 1
            elif j < len(after):
                theirs *= after[j]
                j += 1
            else:
                ours *= before[i]
                i += 1
            if ours == theirs and j > start_j and i > start_i:
                break
        # Axes of length 1 carry nothing; what is left of them on one side belongs to no group.
        old = [k for k in range(start_i, i) if before[k] != 1]
        new = [k for k in range(start_j, j) if after[k] != 1]
        if len(new) == 1 and old and not any(labels[k] for k in old[1:]):
            first, rest = labels[old[0]], 1
            for k in old[1:]:
                rest *= before[k]
            result[new[0]] = Label(first.node, first.width * rest) if first else None
        else:
            for k in old:
                axes.pin(labels[k])
    return result
