"""What one expert's calibration inputs said about every module: the record that travels and is cached."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import GramError, did_you_mean

Layout = Literal["linear", "conv1d", "conv2d"]


@dataclass(frozen=True, eq=False)
class TaskGrams:
    """Grams of one task, by key; modules that always read the same inputs share a key.

    ``grams[key]``: (i, i), or (i + 1, i + 1) where ``has_bias[key]``, of ``count[key]`` inputs; a key is the weight
    parameter's name of the first module that shares it. ``key_of``, ``layout`` and ``bias_of`` go by weight parameter
    name; ``bias_of`` lists the biases that the homogeneous coordinate covers. ``layout``: "linear" weights are (o, i),
    "conv1d" (transformers' Conv1D) transposed (i, o), "conv2d" (o, c, kh, kw) with a Gram over flattened patches.
    ``skipped``: why a weight of two or more dimensions, or a norm's, has no Gram.
    ``norms[name]``: for a norm's weight of c channels the Grams (c, 2, 2) of ``(x_hat, 1)``, or (c, 1, 1) of ``x_hat``
    where the norm has no bias; ``norm_bias`` names the bias. Empty unless norms were asked for.

    ``grams`` and ``norms`` may read from disk on access.
    """

    grams: Mapping[str, Tensor] = field(default_factory=dict)
    key_of: dict[str, str] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)
    has_bias: dict[str, bool] = field(default_factory=dict)
    bias_of: dict[str, str] = field(default_factory=dict)
    layout: dict[str, Layout] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    norm_bias: dict[str, str] = field(default_factory=dict)

    def for_weight(self, name: str) -> Tensor:
        """The Gram of a weight parameter. Raises `GramError` where it has none, saying why."""
        if name in self.key_of:
            return self.grams[self.key_of[name]]
        if name in self.skipped:
            raise GramError(f"{name} has no Gram: {self.skipped[name]}", "the module keeps the anchor")
        raise GramError(f"no weight {name}", did_you_mean(name, self.key_of))

    def renamed(self, names: Mapping[str, str]) -> TaskGrams:
        """The same Grams with parameters called by their new names; names that are not listed stay."""

        def new(name: str) -> str:
            return names.get(name, name)

        return TaskGrams(
            grams={new(k): g for k, g in self.grams.items()},
            key_of={new(n): new(k) for n, k in self.key_of.items()},
            count={new(k): c for k, c in self.count.items()},
            has_bias={new(k): b for k, b in self.has_bias.items()},
            bias_of={new(n): new(b) for n, b in self.bias_of.items()},
            layout={new(n): kind for n, kind in self.layout.items()},
            skipped={new(n): why for n, why in self.skipped.items()},
            norms={new(n): g for n, g in self.norms.items()},
            norm_bias={new(n): new(b) for n, b in self.norm_bias.items()},
        )

    def to(self, dtype: torch.dtype) -> TaskGrams:
        """The same record with the modules' Grams in ``dtype``: float32 halves the memory of float64."""
        return replace(self, grams={k: g.to(dtype) for k, g in self.grams.items()})

    @property
    def bytes(self) -> int:
        """Memory of the Grams."""
        return sum(g.numel() * g.element_size() for g in (*self.grams.values(), *self.norms.values()))

    def joined(self, other: TaskGrams) -> TaskGrams:
        """Both records in one, for weights collected in turns; a weight with a Gram in one is not skipped."""
        found: dict[str, Any] = {f.name: _either(getattr(other, f.name), getattr(self, f.name)) for f in fields(self)}
        measured = found["key_of"].keys() | found["norms"].keys()
        return TaskGrams(**found | {"skipped": {n: w for n, w in found["skipped"].items() if n not in measured}})


def _either(first: Mapping[str, Any], second: Mapping[str, Any]) -> Mapping[str, Any]:
    """Both mappings in one, nothing read; the first one's values where both have a name."""
    if isinstance(first, dict) and isinstance(second, dict):
        return second | first
    return ChainMap(first, second)  # type: ignore[arg-type]
