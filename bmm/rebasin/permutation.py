"""Permutations of a model's units, and what they do to its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..anchors.anchor import named_generator
from .spec import Group, Site, Spec


@dataclass(frozen=True)
class Arrangement:
    """Where each unit of a group comes from.

    Position ``a`` is taken by unit ``outer[a]`` (n,); inside it, place ``j`` of a level by ``inner[level][a, j]``,
    (n, m). All int64.
    """

    outer: Tensor
    inner: Mapping[str, Tensor]

    @classmethod
    def identity(cls, group: Group) -> Arrangement:
        return cls(torch.arange(group.size), {k: torch.arange(m).repeat(group.size, 1) for k, m in group.inner.items()})

    def then(self, later: Arrangement) -> Arrangement:
        """This arrangement, then ``later`` on its result."""
        moved = {k: v[later.outer] for k, v in self.inner.items()}  # (n, m)
        inner = {k: moved[k].gather(1, later.inner[k]) for k in moved}
        return Arrangement(self.outer[later.outer], inner)

    def inverse(self) -> Arrangement:
        back = self.outer.argsort()
        return Arrangement(back, {k: v.argsort(1)[back] for k, v in self.inner.items()})

    @property
    def is_identity(self) -> bool:
        own = torch.arange(len(self.outer))
        return torch.equal(self.outer, own) and all(
            torch.equal(v, torch.arange(v.shape[1]).expand_as(v)) for v in self.inner.values()
        )

    def index(self, group: Group, site: Site, length: int) -> Tensor:
        """``(length,)``: the whole axis after the permutation, as indices into the axis before it."""
        n, *_, width = group.dims(site)
        place = self.outer[:, None]  # (n, 1), grows to (n, entries of a unit)
        for level in site.levels:
            m = group.inner[level]
            place = (place[:, :, None] * m + self.inner[level][:, None, :]).reshape(n, -1)
        place = (place[:, :, None] * width + torch.arange(width)).reshape(-1)
        whole = torch.arange(length)
        whole[site.start : site.start + len(place)] = place + site.start
        return whole


@dataclass(frozen=True)
class Permutation:
    """One arrangement a group of a specification."""

    spec: Spec
    arrangements: Mapping[str, Arrangement]

    @classmethod
    def identity(cls, spec: Spec) -> Permutation:
        return cls(spec, {g.name: Arrangement.identity(g) for g in spec.groups})

    @classmethod
    def random(cls, spec: Spec, seed: int = 0) -> Permutation:
        """Uniform over all valid permutations; the same for the same seed and group names."""
        return cls(spec, {g.name: _random(g, seed) for g in spec.groups})

    def inverse(self) -> Permutation:
        return Permutation(self.spec, {k: a.inverse() for k, a in self.arrangements.items()})

    def apply(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All of ``tensors``, permuted: new tensors where a group touches them, the given ones elsewhere."""
        return dict(self.stream(tensors))

    def stream(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """`apply`, one tensor at a time. Values move and are not computed with: dtype and bits stay."""
        sites: dict[str, list[tuple[Group, Site]]] = {}
        for group in self.spec.groups:
            for site in group.sites:
                sites.setdefault(site.tensor, []).append((group, site))
        for name in tensors:
            tensor = tensors[name]
            for group, site in sites.get(name, ()):
                tensor = take(tensor, group, site, self.arrangements[group.name])
            yield name, tensor

    @property
    def moved(self) -> float:
        """Share of units (heads, channels, hidden units) that stand elsewhere than before."""
        moved = sum(int((a.outer != torch.arange(len(a.outer))).sum()) for a in self.arrangements.values())
        return moved / max(1, sum(len(a.outer) for a in self.arrangements.values()))


def take(tensor: Tensor, group: Group, site: Site, arrangement: Arrangement) -> Tensor:
    """``tensor`` with one site rearranged."""
    index = arrangement.index(group, site, tensor.shape[site.axis])
    return tensor.index_select(site.axis, index.to(tensor.device))


def _random(group: Group, seed: int) -> Arrangement:
    draw = named_generator("rebasin permutation", seed, group.name)
    outer = torch.randperm(group.size, generator=draw)
    inner = {
        k: torch.stack([torch.randperm(m, generator=draw) for _ in range(group.size)]) for k, m in group.inner.items()
    }
    return Arrangement(outer, inner)
