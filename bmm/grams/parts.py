"""How large a model's Grams are, and which of them are collected together where memory is short."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from .sites import find_sites


def gram_bytes(model: nn.Module, names: Collection[str] | None = None) -> dict[str, int]:
    """Bytes of the Gram of every weight that has one, in the model's order, as if none were shared."""
    sites, _ = find_sites(model, names, True)
    return {name: 8 * (site.dim + site.homogeneous) ** 2 for site in sites for name in site.names}


def in_parts(sizes: Mapping[str, int], limit: float) -> list[set[str]]:
    """Names in order, cut into sets of no more than ``limit`` bytes (or of one name); one set where limit is 0."""
    if limit <= 0 or not sizes:
        return [set(sizes)]
    parts: list[set[str]] = []
    held = 0
    for name, size in sizes.items():
        if not parts or held + size > limit:
            parts.append(set())
            held = 0
        parts[-1].add(name)
        held += size
    return parts
