"""Bookkeeping of a trace: which axes must be permuted together, and which must not be permuted at all."""

from __future__ import annotations

from dataclasses import dataclass


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
