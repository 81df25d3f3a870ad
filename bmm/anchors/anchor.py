"""What a merging method is to the rest of the house: its knobs, its kernel and the context a kernel works in.

A *kernel* maps the task vectors of one tensor to one merged task vector. Adding a method takes one file with the kernel
and one row in `registry`; bounds, defaults and help of its knobs are written down in that row and nowhere else.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import MergeError, did_you_mean
from ..notation import Tensors

KnobValue = float | int | str

TaskVectors = Iterable[tuple[str, Tensor]]
"""Every floating tensor that is not empty, as (name, taus (T, *shape)); each new iteration is one more pass.

To an elementwise method large tensors come in flat pieces (T, n), one after the other under the same name."""

Kernel = Callable[..., Tensor]
"""``kernel(taus (T, *shape), context, **knobs) -> d (*shape)``: pure, and blind to the knobs marked `Knob.linear`."""

Scan = Callable[[TaskVectors, Mapping[str, Any], "Whole"], Any]
"""``scan(task_vectors, knobs, whole) -> state``: what a kernel must know of the whole model, found before the first
tensor."""

Parts = Iterable[tuple[Tensor, Tensor]]
"""One tensor as (w0, taus): flat pieces w0 (n,) and taus (T, n) one after the other, or once all of it."""

Measure = Callable[[Parts, Mapping[str, Any], Tensor], Any]
"""``measure(parts, knobs, weights (T,)) -> state``: what a kernel must know of a tensor that it is handed in pieces."""

NEEDS = {
    "grams": "Gram matrices of every module's inputs (calibration inputs)",
    "fisher": "a diagonal Fisher for every expert (calibration inputs)",
    "base_fisher": "a diagonal Fisher of the base (calibration inputs)",
    "sequential_grams": "Gram matrices of the merged model's own inputs, layer by layer (calibration inputs)",
    "score": "a score of candidate models (validation data)",
}
"""Statistics a method may need besides the weights."""


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

    @classmethod
    def choice(cls, name: str, choices: tuple[str, ...], help: str, default: str = "") -> Knob:
        """A knob that takes one of ``choices``; the first is the default unless another is named."""
        return cls(name, default or choices[0], None, None, "choice", help, choices)

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

    ``w0`` is the base's tensor, in the shape, dtype and device of one task vector; ``weights`` (T,) the task weights
    a_t, ones unless the user gave some; ``grams`` the T Grams (i, i) of the inputs of this weight, ``fisher``
    (T, *shape) and ``base_fisher`` (*shape) the diagonal Fishers of experts and base, each None where there is none;
    ``depth`` where in the model the tensor sits, 0 (input) to 1 (output); ``state`` what the scan or the method's
    ``measure`` returned, else None.
    """

    name: str
    w0: Tensor
    weights: Tensor
    grams: tuple[Tensor, ...] | None = None
    fisher: Tensor | None = None
    base_fisher: Tensor | None = None
    depth: float = 0.0
    state: Any = None


@dataclass(frozen=True)
class Whole:
    """What a scan may look at besides the task vectors: task weights (T,), the models themselves and the experts'
    Fishers (perhaps on disk: reading costs), and the score of a candidate model where the method asked for one."""

    weights: Tensor
    base: Tensors
    experts: Sequence[Tensors]
    score: Callable[[Tensors], float] | None = None
    fisher: Sequence[Tensors] = ()


@dataclass(frozen=True)
class Anchor:
    """One merging method: a row of the registry.

    ``paper`` is "arXiv id, short title". ``matrices``: the kernel is defined on matrices; it is given taus (T, o, i),
    and every tensor without matrix form (see `matrix_shape`) gets the mean of its task vectors instead, or what the
    kernel ``others`` makes of them. ``needs`` names the statistics the method cannot do without, keys of `NEEDS`,
    ``takes`` those it makes use of where they are given. ``elementwise``: every entry is merged by itself (and by what
    the scan or ``measure`` found), so that a large tensor is taken in flat pieces. ``scan``, where given, runs once
    before the first tensor is merged, ``measure`` before each tensor that comes in pieces; what they return is the
    kernel's ``context.state``. ``weights``: which task weights the method takes: "" none, "positive" (>= 0, not all 0)
    or "any" (negative ones forget a task). ``experts``: the fewest and the most experts it takes, None for no limit.

    ``wrapped``: the method that this one scales by depth (LiNeS, see `lines`), None for a method of its own.

    ``formula``, ``cost`` and ``when`` are for the reader: the formula in words and symbols, what one (o, i) matrix
    costs for T experts, and when to choose the method.
    """

    name: str
    title: str
    paper: str
    summary: str
    knobs: tuple[Knob, ...]
    kernel: Kernel
    matrices: bool = False
    needs: frozenset[str] = frozenset()
    takes: frozenset[str] = frozenset()
    others: Kernel | None = None
    scan: Scan | None = None
    measure: Measure | None = None
    weights: Literal["", "positive", "any"] = ""
    experts: tuple[int, int | None] = (1, None)
    wrapped: Anchor | None = None
    elementwise: bool = False
    formula: str = ""
    cost: str = ""
    when: str = ""

    @property
    def linear(self) -> Knob | None:
        """The knob the merged task vector is proportional to, if there is one."""
        return next((knob for knob in self.knobs if knob.linear), None)

    @property
    def defaults(self) -> dict[str, KnobValue]:
        """Default value by knob name."""
        return {knob.name: knob.default for knob in self.knobs}


def weighted_mean(taus: Tensor, weights: Tensor) -> Tensor:
    """``sum_t a_t tau_t / sum_t |a_t|``, (T, *shape) -> (*shape); with equal positive weights exactly the mean."""
    if bool((weights == weights[0]).all()) and bool(weights[0] > 0):
        return taus.mean(0)
    return weighted_sum(taus, weights) / weights.abs().sum()


def weighted_sum(taus: Tensor, weights: Tensor) -> Tensor:
    """``sum_t a_t tau_t``, (T, *shape) -> (*shape); with weights of 1 exactly the sum."""
    return total(scaled(taus, weights))


def total(taus: Tensor) -> Tensor:
    """The sum over tasks, (T, *shape) -> (*shape), one task after the other.

    Faster than a reduction over the first dimension, whose order depends on where in a tensor an entry lies.
    """
    out = taus[0].clone() if len(taus) == 1 else taus[0] + taus[1]  # (*shape)
    for tau in taus[2:]:
        out += tau
    return out


def scaled(taus: Tensor, weights: Tensor) -> Tensor:
    """``a_t tau_t``, (T, *shape) both ways; the very same tensor with weights of 1."""
    if bool((weights == 1).all()):
        return taus
    return taus * weights.to(taus).view(-1, *[1] * (taus.dim() - 1))


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
