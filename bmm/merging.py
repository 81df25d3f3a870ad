"""The whole model prepared once: every module's spectral form, so that a trial is one product a module.

Left of this file things run once (checkpoints, anchor, Grams, decompositions); right of it once a trial.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .checkpoint import ModelPool
from .errors import GramError, RecipeError, did_you_mean
from .grams import TaskGrams, datafree, hybrid_parts
from .groups import search_groups
from .layouts import matrix, matrix_layouts
from .norms import PreparedNorm, prepare_norm
from .notation import StateDict, Tensors
from .records import Hyperparameters
from .repool import InputGrams, Mix, ModuleEvidence, NormEvidence, Trial
from .solver import PreparedModule, Spectrum, decompose, join_bias, prepare, split_bias

SOURCES = ("data", "datafree", "hybrid")


@dataclass(frozen=True)
class Slot:
    """One module of the model: its weight, the bias that is solved with it (or ""), its layout and group.

    ``layout`` "norm": a norm's gamma and beta. ``evidence`` is there where the search changes the pooled Gram.
    """

    weight: str
    bias: str
    layout: str
    group: str
    prepared: PreparedModule | PreparedNorm
    evidence: ModuleEvidence | NormEvidence | None = None


@dataclass(frozen=True)
class PreparedModel:
    """All modules ready to merge; ``rest`` holds the tensors that keep the anchor (and the base's buffers).

    ``tasks`` and ``mix`` say which task weights and gamma the modules are prepared with. ``rest_base`` holds the base's
    part of ``rest`` where the anchor's scale is searched, else None.
    """

    slots: tuple[Slot, ...]
    rest: StateDict
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    tasks: tuple[str, ...] = ()
    mix: Mix = Mix((), 0.0)
    source: str = "data"
    rest_base: StateDict | None = field(default=None, repr=False)

    @property
    def groups(self) -> list[str]:
        """Search groups in order of first appearance."""
        return list(dict.fromkeys(slot.group for slot in self.slots))

    def merge(self, hyperparameters: Hyperparameters) -> StateDict:
        """Merged tensors by name, in float32. ``lam = inf, rho = 1`` for every group is the anchor exactly.

        Task weights and a gamma other than the prepared ones need the model prepared for their ``search``; every
        module then costs one solve more, and every input one factorisation. ``anchor_scale`` moves the prior to
        ``w0 + s (wa - w0)`` in every tensor of the model, solved or not, whatever the anchor is.

        Raises:
            RecipeError: a group without a hyperparameter, or hyperparameters the model is not prepared for.
        """
        scale = self._check(hyperparameters)
        mix = self._mix(hyperparameters)
        trial = None if mix is None else Trial(mix)
        out = self._rest(scale)
        for slot in self.slots:
            lam, rho = hyperparameters.lam[slot.group], hyperparameters.rho[slot.group]
            if trial is None or slot.evidence is None:
                merged = slot.prepared.merge(lam, rho, scale)
            else:
                merged = slot.evidence.merge(lam, rho, scale, trial)
            out |= self._unpack(slot, merged)
        return out

    def sample(self, hyperparameters: Hyperparameters, sigma: float, generator: torch.Generator) -> StateDict:
        """One draw from the posterior over every module's weights, noise ``sigma`` (arXiv 2605.12843, appendix)."""
        scale = self._check(hyperparameters)
        mix = self._mix(hyperparameters)
        out = self._rest(scale)
        for slot in self.slots:
            lam, rho = hyperparameters.lam[slot.group], hyperparameters.rho[slot.group]
            prepared = slot.prepared if mix is None or slot.evidence is None else slot.evidence.spectral(mix)
            out |= self._unpack(slot, prepared.sample(lam, rho, sigma, generator, scale))
        return out

    def fixed(self, point: Hyperparameters) -> PreparedModel:
        """This model decomposed at the point's task weights and gamma, so that many draws there cost no more than with
        the prepared ones."""
        mix = self._mix(point)
        if mix is None:
            return self
        slots = [replace(s, prepared=s.evidence.spectral(mix), evidence=None) for s in self.slots if s.evidence]
        return replace(self, slots=tuple(slots), mix=mix)

    def _check(self, point: Hyperparameters) -> float:
        """The anchor's scale of a point that names every group."""
        missing = [g for g in self.groups if g not in point.lam or g not in point.rho]
        if missing:
            raise RecipeError(
                f"no hyperparameters for group {', '.join(missing)}", f"groups of this model: {', '.join(self.groups)}"
            )
        scale = 1.0 if point.anchor_scale is None else point.anchor_scale
        if scale != 1 and self.rest_base is None:
            raise RecipeError("the model is not prepared for another anchor_scale", "search: [anchor_scale]")
        return scale

    def _mix(self, point: Hyperparameters) -> Mix | None:
        """The point's task weights and gamma; None where they are those the modules are prepared with."""
        if unknown := sorted(point.weights.keys() - set(self.tasks)):
            raise RecipeError(f"weight of unknown task {unknown[0]!r}", did_you_mean(unknown[0], self.tasks))
        if point.gamma is not None and self.source != "hybrid":
            raise RecipeError(f"gamma with {self.source} Grams", "grams: hybrid has one")
        weights = tuple(point.weights.get(t, w) for t, w in zip(self.tasks, self.mix.weights, strict=True))
        mix = Mix(weights, self.mix.gamma if point.gamma is None else point.gamma)
        if mix.same(self.mix):
            return None
        if any(slot.evidence is None for slot in self.slots):
            raise RecipeError("the model is not prepared for other task weights or gamma", "search: [weights, gamma]")
        return mix

    def _rest(self, scale: float) -> StateDict:
        """The tensors no regression solves: the anchor's, its task vector times ``scale``."""
        out = dict(self.rest)
        if scale != 1:
            assert self.rest_base is not None
            out |= {n: w0 + scale * (self.rest[n] - w0) for n, w0 in self.rest_base.items()}
        return out

    def _unpack(self, slot: Slot, merged: Tensor) -> StateDict:
        out = {}
        if slot.bias:
            merged, bias = split_bias(merged)
            out[slot.bias] = bias.reshape(self.shapes[slot.bias])
        if slot.layout == "conv1d":
            merged = merged.mT
        out[slot.weight] = merged.reshape(self.shapes[slot.weight])
        return out


class AnchorGrams(Mapping[str, list[Tensor]]):
    """Data Grams by weight name as the statistics-based anchors take them, read where they are asked for."""

    def __init__(self, task_grams: Sequence[TaskGrams]) -> None:
        self._tasks = task_grams
        self._names = sorted(set[str].intersection(*({*g.key_of} for g in task_grams)))

    def __getitem__(self, name: str) -> list[Tensor]:
        if name not in self._names:
            raise KeyError(name)
        return [g.for_weight(name) for g in self._tasks]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def prepare_model(
    pool: ModelPool,
    anchor: Tensors,
    task_grams: Sequence[TaskGrams] | None = None,
    *,
    source: str = "data",
    gamma: float = 0.5,
    weights: Sequence[float] | None = None,
    normalise: str = "trace",
    bias: str = "joined",
    scheme: str = "depth",
    bands: int = 4,
    overrides: Mapping[str, str] | None = None,
    search: Collection[str] = (),
    transposed: Collection[str] = (),
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> PreparedModel:
    """Prepare every module of a model.

    Args:
        pool: base and experts.
        anchor: the anchor model's tensors by name.
        task_grams: one `TaskGrams` an expert, in the pool's order; needed for ``source`` "data" and "hybrid". Norms
            they hold Grams of are solved, others keep the anchor.
        source: "data", "datafree" (task vectors stand in for activations) or "hybrid" (mixed by ``gamma``).
        weights: task weights a_t >= 0.
        bias: "joined" solves a bias with its weight where the Grams allow it, "anchor" leaves it to the anchor.
        scheme, bands, overrides: how modules are grouped, see `bmm.groups.search_groups`.
        search: what trials may change besides lam and rho, of "weights", "gamma" and "anchor_scale"; the first two
            keep T float64 matrices of a module's size in memory.
        transposed: weights stored (in, out); data Grams know theirs, as does a base with a config.json.
        progress: called with (modules done, modules).

    Raises:
        GramError: Grams missing or of the wrong shape for the source.
        MergeError: numbers that no merge can be made of.
    """
    if source not in SOURCES:
        raise RecipeError(f"no Gram source {source!r}", f"one of {', '.join(SOURCES)}")
    if source != "datafree" and not task_grams:
        raise GramError(f"Gram source {source!r} needs activation Grams", "collect them, or use grams: datafree")
    if source == "hybrid" and not 0 <= gamma <= 1:
        raise GramError(f"gamma is {gamma}", "gamma, the data-free share, lies in [0, 1]")
    data = task_grams if source != "datafree" else None
    layouts = matrix_layouts(pool, data, transposed)
    norms = sorted({n for g in data or () for n in g.norms if n in pool.float_names} - layouts.keys())
    groups = search_groups([*layouts, *norms], scheme, bands, overrides)
    mix = Mix(tuple(1.0 for _ in pool.experts) if weights is None else tuple(weights), gamma)
    remixed = not {"weights", "gamma"}.isdisjoint(search)
    spectra: dict[tuple[str, ...], tuple[Spectrum, InputGrams | None]] = {}
    slots = []
    # One decomposition for the modules that read the same input, unless their Grams depend on the weight.
    shared = data if data and source == "data" else None
    keys = {name: tuple(g.key_of.get(name, "") for g in shared) if shared else (name,) for name in layouts}
    left = Counter(keys.values())
    for done, (name, layout) in enumerate(sorted(layouts.items())):
        joined = bias_of(name, data) if data and bias == "joined" else ""
        w0, experts, wa = _stored(pool, anchor, name, joined, layout)
        key = keys[name]
        if key not in spectra:
            parts = _parts(name, experts - w0, data, source, bool(joined), bias == "anchor")
            grams = (
                parts[0]
                if len(parts) == 1
                else [(1 - gamma) * seen + gamma * free for seen, free in zip(*parts, strict=True)]
            )
            kept = InputGrams(tuple(map(tuple, parts)), normalise, name) if remixed else None
            spectra[key] = decompose(grams, weights, normalise, device, name), kept
        spectrum, kept = spectra[key]
        prepared = prepare(w0.float(), experts, spectrum.grams, wa, weights, normalise, device, name, spectrum)
        evidence = ModuleEvidence.of(prepared, kept, experts - w0) if kept else None
        slots.append(Slot(name, joined, layout, groups[name], prepared, evidence))
        left[key] -= 1
        if not left[key]:
            del spectra[key]  # and with it T Grams
        if progress:
            progress(done + 1, len(layouts))
    assert data is not None or not norms
    slots += [_norm_slot(pool, anchor, n, data or (), weights, normalise, groups[n], remixed, device) for n in norms]
    solved = [n for s in slots for n in (s.weight, s.bias) if n]
    rest = {n: anchor[n].to(device) for n in pool.names if n not in set(solved)}
    floating = set(pool.float_names)
    rest_base = {n: pool.base[n].to(rest[n]) for n in rest if n in floating} if "anchor_scale" in search else None
    shapes = {n: tuple(pool.base[n].shape) for n in solved}
    return PreparedModel(tuple(slots), rest, shapes, pool.tasks, mix, source, rest_base)


def _stored(pool: ModelPool, anchor: Tensors, name: str, bias: str, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Base (o, i), experts (T, o, i) and anchor (o, i) of a module in float64, the bias joined where there is one."""

    def matrix_of(tensors: Tensors) -> Tensor:
        weight = matrix(tensors[name].double(), layout)
        return join_bias(weight, tensors[bias].double().flatten()) if bias else weight

    return matrix_of(pool.base), torch.stack([matrix_of(e) for e in pool.experts]), matrix_of(anchor)


def _norm_slot(
    pool: ModelPool,
    anchor: Tensors,
    name: str,
    data: Sequence[TaskGrams],
    weights: Sequence[float] | None,
    normalise: str,
    group: str,
    remixed: bool,
    device: torch.device | str,
) -> Slot:
    """A norm prepared; a task whose run never reached it contributes zero."""
    bias = next((g.norm_bias[name] for g in data if name in g.norm_bias), "")
    w0, experts, wa = _stored(pool, anchor, name, bias, "norm")
    zero = torch.zeros(*w0.shape, w0.shape[1], dtype=torch.float64)
    grams = [g.norms.get(name, zero) for g in data]
    prepared = prepare_norm(w0.float(), experts, grams, wa, weights, normalise, device, name)
    evidence = NormEvidence(prepared, experts, grams, normalise) if remixed else None
    return Slot(name, bias, "norm", group, prepared, evidence)


def bias_of(name: str, data: Sequence[TaskGrams]) -> str:
    """The bias that is solved with a weight, by all tasks' Grams, or an empty name."""
    biases = {g.bias_of.get(name, "") for g in data if name in g.key_of and g.has_bias[g.key_of[name]]}
    return biases.pop() if len(biases) == 1 else ""


def _parts(
    name: str, taus: Tensor, data: Sequence[TaskGrams] | None, source: str, joined: bool, cut: bool
) -> list[list[Tensor]]:
    """The T Grams of one module, or of hybrid ones the data and the data-free part; see `task_parts`."""
    grams = data if data is not None and source != "datafree" else [None] * len(taus)
    found = [task_parts(name, tau, g, source, joined, cut) for tau, g in zip(taus, grams, strict=True)]
    return [list(part) for part in zip(*found, strict=True)]


def task_parts(
    name: str,
    tau: Tensor,
    grams: TaskGrams | None,
    source: str,
    joined: bool,
    cut: bool,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """One task's Gram of one module, or of a hybrid one the data and the data-free part; zero where it never ran.

    ``cut`` leaves out the bias coordinate of the data Gram; ``dtype`` is the data-free Gram's, see `datafree`.
    """
    if source == "datafree":
        return [datafree(tau, dtype)]
    assert grams is not None
    width = tau.shape[-1]
    seen = torch.zeros(width, width, dtype=torch.float64)
    if name in grams.key_of:
        seen = grams.for_weight(name)
        if cut and grams.has_bias[grams.key_of[name]]:
            seen = seen[:-1, :-1]
    if seen.shape != (width, width):
        raise GramError(
            f"{name}: Gram of shape {tuple(seen.shape)} for {width} inputs{' with bias' if joined else ''}",
            "these Grams belong to another model: collect them again",
        )
    return [seen] if source == "data" else list(hybrid_parts(seen, datafree(tau[:, :-1] if joined else tau, dtype)))
