"""What a merging method is to the rest of the house: its knobs, its kernel and the context a kernel works in.

A *kernel* maps the task vectors of one tensor to one merged task vector. Adding a method takes one file with the kernel
and one row in `registry`; bounds, defaults and help of its knobs are written down in that row and nowhere else.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import MergeError, did_you_mean

KnobValue = float | int | str

TaskVectors = Iterable[tuple[str, Tensor]]
"""Every floating tensor that is not empty, as (name, taus (T, *shape)); each new iteration is one more pass."""

Kernel = Callable[..., Tensor]
"""``kernel(taus (T, *shape), context, **knobs) -> d (*shape)``: pure, and blind to the knobs marked `Knob.linear`."""

Scan = Callable[[TaskVectors, Mapping[str, Any]], Any]
"""``scan(task_vectors, knobs) -> state``: what a kernel must know of the whole model, found before the first tensor."""


@dataclass(frozen=True)
class Knob:
    """One hyperparameter of a method, with inclusive bounds ``low`` and ``high`` (or ``choices``).

    ``linear`` marks a final scale: the merged task vector is proportional to it. Kernels never see a linear knob; the
    driver multiplies, so that proportionality holds by construction and a search may vary it without merging again.
    """

    name: str
    default: KnobValue
    low: float | None
    high: float | None
    kind: Literal["float", "int", "choice"]
    help: str
    choices: tuple[str, ...] = ()
    linear: bool = False

    def validate(self, value: Any) -> KnobValue:
        """The value in the knob's own type; raises `MergeError` for a wrong type, a value out of bounds or a choice
        that does not exist."""
        if self.kind == "choice":
            if value in self.choices:
                return str(value)
            raise MergeError(f"{self.name} = {value!r} is not a choice", did_you_mean(str(value), self.choices))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise MergeError(f"{self.name} = {value!r} is not a finite number", self._range())
        if self.kind == "int" and value != int(value):
            raise MergeError(f"{self.name} = {value!r} is not a whole number", self._range())
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise MergeError(f"{self.name} = {value!r} is out of range", self._range())
        return int(value) if self.kind == "int" else float(value)

    def parse(self, text: str) -> KnobValue:
        """The value written as ``text`` on a command line; raises `MergeError` as `validate` does."""
        if self.kind == "choice":
            return self.validate(text)
        try:
            return self.validate(int(text) if self.kind == "int" else float(text))
        except ValueError as error:
            raise MergeError(f"{self.name} = {text!r} is not a number", self._range()) from error

    def _range(self) -> str:
        low = "-inf" if self.low is None else f"{self.low:g}"
        high = "inf" if self.high is None else f"{self.high:g}"
        return f"{self.name} takes {self.kind} values from {low} to {high}; the default is {self.default}"


@dataclass(frozen=True)
class Context:
    """What a kernel may look at besides the task vectors of its tensor.

    ``w0`` is the base's tensor, in the shape, dtype and device of one task vector; ``grams`` the T Grams (i, i) of the
    inputs of this weight, or None where there are none; ``state`` what the method's scan returned, else None.
    """

    name: str
    w0: Tensor
    grams: tuple[Tensor, ...] | None = None
    state: Any = None


@dataclass(frozen=True)
class Anchor:
    """One merging method: a row of the registry.

    ``paper`` is "arXiv id, short title". ``matrices``: the kernel is defined on matrices; it is given taus (T, o, i),
    and every tensor without matrix form (see `matrix_shape`) gets the mean of its task vectors instead. ``needs`` names
    the statistics the method cannot do without: a subset of {"grams"}. ``scan``, where given, runs once before the
    first tensor is merged.
    """

    name: str
    title: str
    paper: str
    summary: str
    knobs: tuple[Knob, ...]
    kernel: Kernel
    matrices: bool = False
    needs: frozenset[str] = frozenset()
    scan: Scan | None = None

    @property
    def linear(self) -> Knob | None:
        """The knob the merged task vector is proportional to, if there is one."""
        return next((knob for knob in self.knobs if knob.linear), None)

    @property
    def defaults(self) -> dict[str, KnobValue]:
        """Default value by knob name."""
        return {knob.name: knob.default for knob in self.knobs}


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The (o, i) under which a parameter of this shape is a matrix, or None where it is not one.

    Two dimensions (Linear weights, embeddings, position tables) are taken as they are; convolutions (o, c, *kernel)
    become (o, c * kernel), the matrix that multiplies unfolded patches. A leading 1 of three dimensions is there for
    broadcasting: (1, n, d) position tables are (n, d), and (1, 1, d) tokens are vectors.
    """
    if len(shape) < 2:
        return None
    if len(shape) == 3 and shape[0] == 1:
        return None if shape[1] == 1 else (shape[1], shape[2])
    return shape[0], math.prod(shape[1:])


def named_generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by a stable hash of ``key``: the same on every machine, independent of any other draw."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
