"""The whole model prepared once: every module's spectral form, so that a trial is one product a module.

Left of this file things run once (checkpoints, anchor, Grams, decompositions); right of it once a trial.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .checkpoint import ModelPool
from .errors import GramError, RecipeError
from .grams import TaskGrams, datafree, hybrid
from .groups import search_groups
from .notation import StateDict, Tensors
from .records import Hyperparameters
from .solver import PreparedModule, Spectrum, decompose, join_bias, prepare, split_bias

SOURCES = ("data", "datafree", "hybrid")


@dataclass(frozen=True)
class Slot:
    """One module of the model: its weight, the bias that is solved with it (or ""), its layout and group."""

    weight: str
    bias: str
    layout: str
    group: str
    prepared: PreparedModule


@dataclass(frozen=True)
class PreparedModel:
    """All modules ready to merge; ``rest`` holds the tensors that keep the anchor (and the base's buffers)."""

    slots: tuple[Slot, ...]
    rest: StateDict
    shapes: dict[str, tuple[int, ...]] = field(repr=False)

    @property
    def groups(self) -> list[str]:
        """Search groups in order of first appearance."""
        return list(dict.fromkeys(slot.group for slot in self.slots))

    def merge(self, hyperparameters: Hyperparameters) -> StateDict:
        """Merged tensors by name, in float32. ``lam = inf, rho = 1`` for every group is the anchor exactly.

        Raises:
            RecipeError: a group without a hyperparameter.
        """
        missing = [g for g in self.groups if g not in hyperparameters.lam or g not in hyperparameters.rho]
        if missing:
            raise RecipeError(
                f"no hyperparameters for group {', '.join(missing)}", f"groups of this model: {', '.join(self.groups)}"
            )
        out = dict(self.rest)
        for slot in self.slots:
            merged = slot.prepared.merge(hyperparameters.lam[slot.group], hyperparameters.rho[slot.group])
            out |= self._unpack(slot, merged)
        return out

    def sample(self, hyperparameters: Hyperparameters, sigma: float, generator: torch.Generator) -> StateDict:
        """One draw from the posterior over every module's weights, noise ``sigma`` (arXiv 2605.12843, appendix)."""
        out = dict(self.rest)
        for slot in self.slots:
            lam, rho = hyperparameters.lam[slot.group], hyperparameters.rho[slot.group]
            out |= self._unpack(slot, slot.prepared.sample(lam, rho, sigma, generator))
        return out

    def _unpack(self, slot: Slot, merged: Tensor) -> StateDict:
        out = {}
        if slot.bias:
            merged, out[slot.bias] = split_bias(merged)
        if slot.layout == "conv1d":
            merged = merged.mT
        out[slot.weight] = merged.reshape(self.shapes[slot.weight])
        return out


def matrix(tensor: Tensor, layout: str) -> Tensor:
    """A stored weight as (o, i): transformers' Conv1D is transposed, convolutions are flattened."""
    return tensor.mT if layout == "conv1d" else tensor.flatten(1)


def matrix_layouts(pool: ModelPool, task_grams: Sequence[TaskGrams] | None) -> dict[str, str]:
    """Weights the solver takes: those with a data Gram, or without data all 2-d and convolution weights."""
    if task_grams:
        layouts: dict[str, str] = {}
        for grams in task_grams:
            layouts |= {name: grams.layout[name] for name in grams.key_of if name in pool.float_names}
        return layouts
    shapes = {name: pool.base[name].shape for name in pool.float_names}
    return {
        name: "conv2d" if len(shape) == 4 else "linear"
        for name, shape in shapes.items()
        if len(shape) in (2, 4) and name.endswith("weight") and "embed" not in name.lower().split(".")[-2]
    }


def anchor_grams(task_grams: Sequence[TaskGrams]) -> dict[str, list[Tensor]]:
    """Data Grams by weight name as the statistics-based anchors take them."""
    names = {name for grams in task_grams for name in grams.key_of}
    return {n: [g.for_weight(n) for g in task_grams] for n in names if all(n in g.key_of for g in task_grams)}


def prepare_model(
    pool: ModelPool,
    anchor: Tensors,
    task_grams: Sequence[TaskGrams] | None = None,
    *,
    source: str = "data",
    gamma: float = 0.5,
    weights: Sequence[float] | None = None,
    normalise: str = "trace",
    scheme: str = "depth",
    bands: int = 4,
    overrides: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> PreparedModel:
    """Prepare every module of a model.

    Args:
        pool: base and experts.
        anchor: the anchor model's tensors by name.
        task_grams: one `TaskGrams` an expert, in the pool's order; needed for ``source`` "data" and "hybrid".
        source: "data", "datafree" (task vectors stand in for activations) or "hybrid" (mixed by ``gamma``).
        weights: task weights a_t >= 0.
        scheme, bands, overrides: how modules are grouped, see `bmm.groups.search_groups`.
        progress: called with (modules done, modules).

    Raises:
        GramError: Grams missing or of the wrong shape for the source.
        MergeError: numbers that no merge can be made of.
    """
    if source not in SOURCES:
        raise RecipeError(f"no Gram source {source!r}", f"one of {', '.join(SOURCES)}")
    if source != "datafree" and not task_grams:
        raise GramError(f"Gram source {source!r} needs activation Grams", "collect them, or use grams: datafree")
    data = task_grams if source != "datafree" else None
    layouts = matrix_layouts(pool, data)
    groups = search_groups(layouts, scheme, bands, overrides)
    spectra: dict[tuple[str, ...], Spectrum] = {}
    slots = []
    for done, (name, layout) in enumerate(sorted(layouts.items())):
        bias = _bias_of(name, data) if data else ""

        def stored(tensors: Tensors, name: str = name, layout: str = layout, bias: str = bias) -> Tensor:
            weight = matrix(tensors[name].double(), layout)
            return join_bias(weight, tensors[bias].double()) if bias else weight

        w0, wa = stored(pool.base), stored(anchor)
        experts = torch.stack([stored(expert) for expert in pool.experts])  # (T, o, i)
        # One decomposition for the modules that read the same input, unless their Grams depend on the weight.
        key = tuple(g.key_of.get(name, "") for g in data) if data and source == "data" else (name,)
        if key not in spectra:
            spectra[key] = decompose(
                _grams(name, experts - w0, data, source, gamma, bool(bias)),
                weights, normalise, device, name,
            )  # fmt: skip
        prepared = prepare(w0.float(), experts, spectra[key].grams, wa, weights, normalise, device, name, spectra[key])
        slots.append(Slot(name, bias, layout, groups[name], prepared))
        if progress:
            progress(done + 1, len(layouts))
    solved = {s.weight for s in slots} | {s.bias for s in slots}
    rest = {n: anchor[n].to(device) for n in pool.names if n not in solved}
    shapes = {n: tuple(pool.base[n].shape) for n in layouts}
    return PreparedModel(tuple(slots), rest, shapes)


def _bias_of(name: str, data: Sequence[TaskGrams]) -> str:
    biases = {g.bias_of.get(name, "") for g in data if name in g.key_of and g.has_bias[g.key_of[name]]}
    return biases.pop() if len(biases) == 1 else ""


def _grams(
    name: str, taus: Tensor, data: Sequence[TaskGrams] | None, source: str, gamma: float, bias: bool
) -> list[Tensor]:
    """The T Grams of one module; a task whose run never reached it contributes zero."""
    if source == "datafree":
        return [datafree(tau) for tau in taus]
    assert data is not None
    width = taus.shape[-1]
    zero = torch.zeros(width, width, dtype=torch.float64)
    seen = [g.for_weight(name) if name in g.key_of else zero for g in data]
    for gram in seen:
        if gram.shape != zero.shape:
            raise GramError(
                f"{name}: Gram of shape {tuple(gram.shape)} for {width} inputs{' with bias' if bias else ''}",
                "these Grams belong to another model: collect them again",
            )
    if source == "data":
        return seen
    return [hybrid(g, datafree(tau[:, :-1] if bias else tau), gamma) for g, tau in zip(seen, taus, strict=True)]
