"""Weight matching: permute experts into the reference's basin (Git Re-Basin, arXiv 2209.04836).

Maximises ``<A, pi(B)>`` over the permutations ``pi`` of a specification by coordinate descent: with all other groups
held, the best arrangement of one group is a linear assignment, solved exactly. A step is kept only where the inner
product really rises, so the history never falls, and the descent ends at a local optimum (the problem is NP-hard).

Attention heads are matched as blocks. Where permutations inside a head are allowed too, each pair of heads is scored
by its best inner permutation, so that heads are found whatever the order inside them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..anchors.anchor import named_generator
from ..checkpoint.agreement import info_of
from ..errors import MergeError, did_you_mean
from ..notation import Tensors
from .permutation import Arrangement, Permutation, take
from .spec import Group, Site, Spec

To = Literal["first", "mean"]
LARGE = 1 << 26
"""Elements of a component above which the matching computes in float32."""
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-9}
"""Gains below this share of the tensors' norms are rounding, by the dtype of the computation."""


@dataclass(frozen=True)
class Matching:
    """Permutations of T experts and how they were found.

    ``history``: the objective before the first and after each pass; it never falls. It is the sum of inner products of
    the matched tensors: of each expert with the reference, or with ``to="mean"`` of every two models; this one begins
    where the experts have been matched to the reference.
    ``similarity``: for each expert the cosine with the reference before and after, over the matched tensors.
    """

    permutations: tuple[Permutation, ...]
    history: tuple[float, ...]
    similarity: tuple[tuple[float, float], ...]

    @property
    def passes(self) -> int:
        """Passes over all groups; the last one changed nothing, unless the limit was reached."""
        return len(self.history) - 1


def match(
    reference: Tensors,
    experts: Sequence[Tensors],
    spec: Spec,
    *,
    to: To = "first",
    seed: int = 0,
    max_passes: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> Matching:
    """Permute each expert to be as close to the reference, or to all the others, as coordinate descent finds.

    Args:
        reference, experts: tensors by name; read group by group, so that checkpoints on disk are not held whole.
        to: "first" matches each expert to the reference alone. "mean" is MergeMany (arXiv 2209.04836, algorithm 3):
            every expert in turn is matched to the mean of all the other models, until nothing changes. The reference
            stays as it is, which fixes the order of units that MergeMany leaves open, and the experts start from their
            match with it (the paper starts from the identity, with means of models that are not aligned at all).
        seed: order in which groups and experts are visited.
        max_passes: at most so many passes over the groups (and over the experts, with "mean").

    Raises:
        MergeError: an unknown ``to``; RecipeError: a specification that does not fit.
    """
    if to not in ("first", "mean"):
        raise MergeError(f"cannot match to {to!r}", did_you_mean(to, ("first", "mean")))
    spec.check({n: info_of(reference, n).shape for n in spec.tensors if n in reference})
    components = spec.components()
    found: list[dict[str, Arrangement]] = [{} for _ in experts]
    histories, sums = [], torch.zeros(len(experts), 4, dtype=torch.float64)
    for done, groups in enumerate(components):
        component = _Component(reference, experts, groups, seed)
        before = component.products()  # (T, 3)
        histories.append(component.match_all(to, max_passes))
        sums += torch.cat([before, component.products()[:, :1]], 1)  # (T, 4)
        for expert, arrangements in zip(found, component.arrangements, strict=True):
            expert.update(arrangements)
        if progress is not None:
            progress(done + 1, len(components))
    # <A, B>, |A|^2, |B|^2, <A, pi(B)> -> cosines; a model of zeros has none.
    norm = (sums[:, 1] * sums[:, 2]).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    cosines = torch.stack([sums[:, 0] / norm, sums[:, 3] / norm], 1).tolist()
    return Matching(
        tuple(Permutation(spec, arrangements) for arrangements in found),
        _added(histories),
        tuple((before, after) for before, after in cosines),
    )


def _added(histories: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Histories of independent components as one; a component that has ended keeps its last value."""
    longest = max(map(len, histories))
    return tuple(sum(h[min(k, len(h) - 1)] for h in histories) for k in range(longest))


class _Component:
    """The tensors that one component of groups touches, of the reference and of all experts, as far as permuted."""

    def __init__(self, reference: Tensors, experts: Sequence[Tensors], groups: Sequence[Group], seed: int) -> None:
        self.groups = groups
        self.key = ("rebasin", seed, *(g.name for g in groups))
        names = sorted({s.tensor for g in groups for s in g.sites if s.matched})
        size = sum(reference[n].numel() for n in names)
        dtype = torch.float32 if size > LARGE else torch.float64

        def read(tensors: Tensors) -> dict[str, Tensor]:
            return {n: tensors[n].detach().to("cpu", dtype) for n in names}

        self.reference = read(reference)
        self.experts = [read(expert) for expert in experts]
        self.arrangements = [{g.name: Arrangement.identity(g) for g in groups} for _ in experts]

    def match_all(self, to: To, max_passes: int) -> list[float]:
        """Match every expert; returns the objective before and after each pass."""
        histories = [self.descend(k, self.reference, max_passes) for k in range(len(self.experts))]
        if to == "first" or len(self.experts) == 1:
            return list(_added(histories))
        history = [self.objective()]
        draw = named_generator(*self.key, "experts")
        # Visited by content, so that the order in which they are given does not matter.
        canonical = sorted(range(len(self.experts)), key=lambda k: _digest(self.experts[k]))
        for _ in range(max_passes):
            for k in (canonical[n] for n in torch.randperm(len(canonical), generator=draw).tolist()):
                others = [self.reference, *(e for j, e in enumerate(self.experts) if j != k)]
                target = {n: torch.stack([o[n] for o in others]).mean(0) for n in self.reference}
                self.descend(k, target, max_passes)
            history.append(self.objective())
            if history[-1] <= history[-2]:
                break
        return history

    def descend(self, expert: int, target: Mapping[str, Tensor], max_passes: int) -> list[float]:
        """Coordinate descent of one expert towards ``target``."""
        tensors, draw = self.experts[expert], named_generator(*self.key, "groups")
        history = [_inner_product(target, tensors, list(target))]
        for _ in range(max_passes):
            order = torch.randperm(len(self.groups), generator=draw).tolist()
            changed = [self._step(expert, self.groups[k], target) for k in order]
            history.append(_inner_product(target, tensors, list(target)) if any(changed) else history[-1])
            if not any(changed):
                break
        return history

    def _step(self, expert: int, group: Group, target: Mapping[str, Tensor]) -> bool:
        """Rearrange one group for the best; False where that gains nothing."""
        tensors = self.experts[expert]
        step = best_arrangement(group, target, tensors)
        if step.is_identity:
            return False
        names = sorted({s.tensor for s in group.sites if s.matched})
        moved = {n: tensors[n] for n in names}
        for site in group.sites:
            if site.matched:
                moved[site.tensor] = take(moved[site.tensor], group, site, step)
        before, after = _inner_product(target, tensors, names), _inner_product(target, moved, names)
        # A group on both axes of one tensor makes the assignment an approximation: it may lose. Less than rounding is
        # no gain: steps to and fro would never end.
        size = sum(float(target[n].norm() * tensors[n].norm()) for n in names)
        if after - before <= ROUNDING[tensors[names[0]].dtype] * size:
            return False
        tensors.update(moved)
        own = self.arrangements[expert]
        own[group.name] = own[group.name].then(step)
        return True

    def objective(self) -> float:
        """Sum of the inner products of all pairs of models."""
        models = [self.reference, *self.experts]
        names = list(self.reference)
        return sum(_inner_product(a, b, names) for i, a in enumerate(models) for b in models[:i])

    def products(self) -> Tensor:
        """``(T, 3)``: <reference, expert>, |reference|^2 and |expert|^2 of each expert as it stands."""
        ref, names = self.reference, list(self.reference)
        own = _inner_product(ref, ref, names)
        rows = [[_inner_product(ref, e, names), own, _inner_product(e, e, names)] for e in self.experts]
        return torch.tensor(rows, dtype=torch.float64)


def best_arrangement(group: Group, target: Tensors, tensors: Tensors) -> Arrangement:
    """The arrangement of one group that brings ``tensors`` closest to ``target``, all else held.

    Exact where the group has one inner level or none; two levels in one site are solved in turns (see `_best_inside`).
    """
    sites = [s for s in group.sites if s.matched]
    ours = [_units(target[s.tensor], group, s) for s in sites]  # each (n, *inner sizes, f)
    theirs = [_units(tensors[s.tensor], group, s) for s in sites]
    n = group.size
    gains = np.zeros((n, n))  # unit b of the expert at position a
    for site, a, b in zip(sites, ours, theirs, strict=True):
        if not site.levels:
            gains += (a.flatten(1) @ b.flatten(1).T).double().numpy()  # (n, n)
    if not group.inner:
        return Arrangement(_assign(gains), {})
    levelled = [k for k, s in enumerate(sites) if s.levels]
    inside: dict[tuple[int, int], dict[str, Tensor]] = {}
    for row in range(n):
        for column in range(n):
            pairs = [(sites[k].levels, ours[k][row], theirs[k][column]) for k in levelled]
            gain, inside[row, column] = _best_inside(pairs, group.inner)
            gains[row, column] += gain
    outer = _assign(gains)
    chosen = [inside[row, column] for row, column in enumerate(outer.tolist())]
    return Arrangement(outer, {level: torch.stack([c[level] for c in chosen]) for level in group.inner})


def _best_inside(
    pairs: Sequence[tuple[tuple[str, ...], Tensor, Tensor]], inner: Mapping[str, int]
) -> tuple[float, dict[str, Tensor]]:
    """The best permutations inside one pair of units, and their inner product.

    ``pairs``: a site's levels, and there the reference's unit and the expert's, each (*inner sizes, f). Levels that
    share a site depend on each other: each is first solved by the sites where the others are known, then they take
    turns while the inner product rises.
    """

    def partners(level: str) -> int:
        return min(len(levels) for levels, _, _ in pairs if level in levels)

    order = sorted(inner, key=lambda level: (partners(level), level))
    chosen: dict[str, Tensor] = {}
    best, result = -float("inf"), chosen
    while True:
        for level in order:
            shared = [p for p in pairs if level in p[0]]
            known = [p for p in shared if all(k in chosen for k in p[0] if k != level)]
            gain = sum(
                _rows(a, levels.index(level)) @ _rows(_arranged(b, levels, chosen, level), levels.index(level)).T
                for levels, a, b in known or shared
            )
            assert isinstance(gain, Tensor)  # (m, m)
            chosen = {**chosen, level: _assign(gain.double().numpy())}
        total = sum(float((a * _arranged(b, levels, chosen)).sum(dtype=torch.float64)) for levels, a, b in pairs)
        if total <= best:
            return best, result
        best, result = total, chosen
        if all(len(levels) == 1 for levels, _, _ in pairs):
            return best, result


def _arranged(unit: Tensor, levels: tuple[str, ...], chosen: Mapping[str, Tensor], besides: str = "") -> Tensor:
    """A unit (*inner sizes, f) with the chosen permutation of each of its levels but ``besides``."""
    for axis, level in enumerate(levels):
        if level in chosen and level != besides:
            unit = unit.index_select(axis, chosen[level])
    return unit


def _rows(unit: Tensor, axis: int) -> Tensor:
    return unit.movedim(axis, 0).flatten(1)  # (m, everything else)


def _units(tensor: Tensor, group: Group, site: Site) -> Tensor:
    """A site as ``(n, *inner sizes, f)``, f the entries of the innermost unit times all other axes of the tensor."""
    stretch = tensor.movedim(site.axis, 0).narrow(0, site.start, group.span(site))
    return stretch.reshape(*group.dims(site)[:-1], -1)


def _assign(gains: np.ndarray) -> Tensor:
    """``(n,)``: for each row the column it gets, so that the gains add up to the most."""
    from scipy.optimize import linear_sum_assignment  # slow to import, and merging does without

    return torch.from_numpy(linear_sum_assignment(gains, maximize=True)[1].astype(np.int64))


def _digest(tensors: Tensors) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _inner_product(a: Tensors, b: Tensors, names: Sequence[str]) -> float:
    return sum(float((a[n] * b[n]).sum(dtype=torch.float64)) for n in names)
