"""Which axes of which tensors share one permutation: the specification of a network's permutation symmetries.

A *group* is a set of exchangeable units (hidden units, channels, attention heads) together with every place where they
are written into the weights. A *site* is one such place: a stretch of one axis of one tensor. Permuting all sites of a
group together leaves the network's function as it is; that is what makes a specification right.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError, did_you_mean


@dataclass(frozen=True)
class Site:
    """A stretch of one axis of one tensor, on which a group's units lie side by side.

    Args:
        tensor, axis: where.
        start: first entry of the stretch; a fused qkv matrix holds three.
        levels: names of the inner permutations that act inside a unit, outermost first.
        width: entries of one unit (of the innermost level), such as the pixels of a flattened channel.
        matched: whether the tensor takes part in the matching; BatchNorm's running statistics only follow.
    """

    tensor: str
    axis: int
    start: int = 0
    levels: tuple[str, ...] = ()
    width: int = 1
    matched: bool = True


@dataclass(frozen=True)
class Group:
    """``size`` exchangeable units; ``inner`` gives the sizes of the permutations inside a unit, by name."""

    name: str
    size: int
    sites: tuple[Site, ...]
    inner: Mapping[str, int] = field(default_factory=dict)

    def dims(self, site: Site) -> tuple[int, ...]:
        """The stretch as a grid: (size, *inner sizes, width)."""
        return (self.size, *(self.inner[level] for level in site.levels), site.width)

    def span(self, site: Site) -> int:
        """Entries of the stretch."""
        return prod(self.dims(site))


@dataclass(frozen=True)
class Spec:
    """All groups of a model; ``notices`` say what was left unpermuted, and why."""

    groups: tuple[Group, ...]
    notices: tuple[str, ...] = ()

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> Spec:
        """This specification if it fits tensors of these shapes; raises `RecipeError` naming the first misfit."""
        if not self.groups:
            raise RecipeError(
                "nothing to permute" + "".join(f"; {n}" for n in self.notices),
                "give model and tasks, so that the network can be traced, or write a spec (docs/rebasin.md)",
            )
        for name, count in Counter(g.name for g in self.groups).items():
            if count > 1:
                raise RecipeError(f"spec: {count} groups are called {name!r}", "give each group its own name")
        taken: dict[tuple[str, int], list[tuple[int, int, str]]] = defaultdict(list)
        for group in self.groups:
            _check_group(group, shapes)
            for site in group.sites:
                taken[site.tensor, site.axis].append((site.start, site.start + group.span(site), group.name))
        for (tensor, axis), stretches in taken.items():
            ordered = sorted(stretches)
            for (_, end, first), (start, _, second) in pairwise(ordered):
                if start < end:
                    raise RecipeError(
                        f"spec: groups {first!r} and {second!r} overlap on axis {axis} of {tensor}",
                        "what is permuted together is one group",
                    )
        return self

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors that are permuted, sorted."""
        return sorted({site.tensor for group in self.groups for site in group.sites})

    def components(self) -> list[tuple[Group, ...]]:
        """Groups that share a matched tensor, directly or through others, together: they are matched jointly.

        Sorted by name within and among components, so that nothing depends on the order of a file.
        """
        found: list[tuple[set[str], list[Group]]] = []
        for group in self.groups:
            tensors, members = {s.tensor for s in group.sites if s.matched}, [group]
            for other in [pair for pair in found if pair[0] & tensors]:
                found.remove(other)
                tensors, members = tensors | other[0], members + other[1]
            found.append((tensors, members))
        return sorted((tuple(sorted(m, key=lambda g: g.name)) for _, m in found), key=lambda c: c[0].name)

    def to_yaml(self) -> str:
        """The text `load_spec` reads."""
        rows = [
            {"name": g.name, "size": g.size}
            | ({"inner": dict(g.inner)} if g.inner else {})
            | {"sites": [_plain(site) for site in g.sites]}
            for g in self.groups
        ]
        return yaml.safe_dump({"groups": rows}, sort_keys=False, default_flow_style=None, width=120)


def load_spec(path: str | Path) -> Spec:
    """Read a specification from a YAML or JSON file; see docs/rebasin.md for its form. Raises `RecipeError`."""
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"cannot read spec {path}: {error.strerror}", "check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}", _FORM) from error
    if not isinstance(raw, Mapping) or not isinstance(raw.get("groups"), list) or set(raw) != {"groups"}:
        raise RecipeError(f"{path}: a spec is a mapping with the one key 'groups', a list", _FORM)
    return Spec(tuple(group for row in raw["groups"] for group in _groups(row, str(path))))


_FORM = "groups: [{name: mlp, size: 64, sites: [{tensor: fc1.weight, axis: 0}, {tensor: fc2.weight, axis: 1}]}]"


def _groups(row: Any, where: str) -> Iterable[Group]:
    """One group, or with ``repeat: N`` the N groups in whose names and tensors ``{n}`` counts from 0."""
    _check_keys(row, ("name", "size", "sites"), ("inner", "repeat"), f"{where}: group")
    name, repeat = str(row["name"]), row.get("repeat", 1)
    where = f"{where}: group {name!r}"
    inner = row.get("inner", {})
    if not isinstance(inner, Mapping) or not isinstance(row["sites"], list):
        raise RecipeError(f"{where}: inner is a mapping of names to sizes, sites a list", _FORM)
    if "repeat" in row and "{n}" not in name:
        raise RecipeError(f"{where}: repeat needs {{n}} in the name", "for example layers.{n}.mlp")
    for n in range(_number(repeat, 1, f"{where}: repeat")):

        def counted(text: str, n: int = n) -> str:
            return text.replace("{n}", str(n)) if "repeat" in row else text

        sites = tuple(_site(site, where, counted) for site in row["sites"])
        sizes = {str(k): _number(v, 1, f"{where}: inner {k}") for k, v in inner.items()}
        yield Group(counted(name), _number(row["size"], 1, f"{where}: size"), sites, sizes)


def _site(raw: Any, where: str, counted: Any) -> Site:
    _check_keys(raw, ("tensor", "axis"), ("start", "levels", "width", "matched"), f"{where}: site")
    levels, matched = raw.get("levels", []), raw.get("matched", True)
    if not isinstance(levels, list) or not isinstance(matched, bool):
        raise RecipeError(f"{where}: levels is a list of names, matched is true or false", _FORM)
    return Site(
        counted(str(raw["tensor"])),
        _number(raw["axis"], 0, f"{where}: axis"),
        _number(raw.get("start", 0), 0, f"{where}: start"),
        tuple(map(str, levels)),
        _number(raw.get("width", 1), 1, f"{where}: width"),
        matched,
    )


def _check_keys(raw: Any, needed: tuple[str, ...], allowed: tuple[str, ...], where: str) -> None:
    if not isinstance(raw, Mapping):
        raise RecipeError(f"{where} is {raw!r}, not a mapping", _FORM)
    for key in raw:
        if key not in needed + allowed:
            raise RecipeError(f"{where}: unknown key {key!r}", did_you_mean(str(key), needed + allowed))
    for key in needed:
        if key not in raw:
            raise RecipeError(f"{where}: no {key}", _FORM)


def _number(value: Any, least: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RecipeError(f"{what} is {value!r}", f"a whole number from {least} up")
    return value


def _check_group(group: Group, shapes: Mapping[str, tuple[int, ...]]) -> None:
    where = f"spec: group {group.name!r}"
    if not any(site.matched for site in group.sites):
        raise RecipeError(f"{where} has no site to match by", "name the tensors its units are written in")
    used = {level for site in group.sites for level in site.levels}
    if used != set(group.inner):
        odd = ", ".join(sorted(used ^ set(group.inner)))
        raise RecipeError(
            f"{where}: inner and the sites' levels differ in {odd}", "use what is declared, and all of it"
        )
    for site in group.sites:
        if site.tensor not in shapes:
            raise RecipeError(f"{where}: no tensor {site.tensor!r}", did_you_mean(site.tensor, shapes))
        shape = shapes[site.tensor]
        if site.axis >= len(shape) or site.start + group.span(site) > shape[site.axis]:
            raise RecipeError(
                f"{where}: {site.tensor} of shape {shape} has no {group.span(site)} entries from {site.start} on axis "
                f"{site.axis}",
                "size x inner sizes x width entries must fit",
            )


def _plain(site: Site) -> dict[str, Any]:
    blank = Site("", 0)
    given = {"start": site.start, "levels": list(site.levels), "width": site.width, "matched": site.matched}
    defaults = {"start": blank.start, "levels": [], "width": blank.width, "matched": blank.matched}
    return {"tensor": site.tensor, "axis": site.axis} | {k: v for k, v in given.items() if v != defaults[k]}
