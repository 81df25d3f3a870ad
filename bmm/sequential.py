"""Grams of the merged model's own inputs, block by block (RegMean++, arXiv 2508.03121).

Ordinary Grams are of what reaches a weight inside each expert. The merged model's inputs are others, because
everything before has been merged. Here blocks are merged in order of execution: task t's inputs pass through the blocks
merged so far, then through expert t's own block, whose weights' inputs make the Grams; then the block is merged and the
next begins. That a block is the step, with the expert's weights inside it, is the published definition. A *block* is
what a parameter name says it is, everything up to its first number (``encoder.layer.3``); weights outside of blocks are
a step each, those that read the same tensor together. Tensors that no Gram decides are merged from the start.

Cost: one pass over the calibration inputs a task and step, against one a task for ordinary Grams.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import anchors
from .checkpoint import ModelPool, fingerprint_tensors
from .errors import GramError
from .evaluation import Task, own_names, swapped
from .evaluation.task import to_device
from .grams import GramStore, TaskGrams, collect, fingerprint, reading_order
from .grams.store import flat, source_of
from .groups import module_of
from .merging import AnchorGrams, prepare_model
from .notation import StateDict
from .records import Hyperparameters

MergeStep = Callable[[Sequence[TaskGrams]], StateDict]
"""Merges the weights that the given Grams (one record a task) are of, and returns them and their biases by name."""


def block_of(parameter: str) -> str:
    """The block a parameter belongs to, its name up to the first number; "" outside of blocks.

    >>> block_of("encoder.layer.3.mlp.fc1.weight")
    'encoder.layer.3'
    """
    words = parameter.split(".")
    depth = next((n for n, word in enumerate(words) if word.isdigit()), None)
    return "" if depth is None else ".".join(words[: depth + 1])


def steps_of(order: Sequence[Sequence[str]]) -> list[tuple[str, tuple[str, ...]]]:
    """(block, its weights) in order of execution, from readings as `reading_order` lists them."""
    steps: dict[str, list[str]] = {}
    for names in order:
        for name in names:
            key = block_of(name) or f" {names[0]}"  # no parameter name begins with a space
            members = steps.setdefault(key, [])
            if name not in members:
                members.append(name)
    return [("" if key.startswith(" ") else key, tuple(names)) for key, names in steps.items()]


@dataclass(frozen=True)
class MergedInputs:
    """What Grams behind merged blocks are collected with.

    ``model`` is the skeleton the tensors are swapped into, ``in_model`` its names of parameters where the checkpoints'
    differ; ``tasks`` and ``batches`` (calibration inputs of every task) come in the pool's order. ``progress`` is
    called with a stage, steps done, steps, and the block.
    """

    model: nn.Module
    pool: ModelPool
    tasks: Sequence[Task]
    batches: Sequence[Sequence[Any]]
    store: GramStore
    in_model: Mapping[str, str]
    device: torch.device | str
    progress: Callable[[str, int, int, str], None]

    def behind_bmm(self, anchor: StateDict, options: Mapping[str, Any], norms: bool = False) -> list[TaskGrams]:
        """Grams behind blocks merged by BMM at lam = 1, rho = 1; ``options`` are those of `prepare_model`, in JSON."""

        def merge(grams: Sequence[TaskGrams]) -> StateDict:
            prepared = prepare_model(self.pool, anchor, grams, scheme="global", device=self.device, **options)
            merged = prepared.merge(Hyperparameters.uniform(prepared.groups, 1.0))
            return {n: merged[n] for slot in prepared.slots for n in (slot.weight, slot.bias) if n}

        return self._cached(anchor, merge, {"bmm": dict(options)}, norms)

    def behind_regmean(
        self, knobs: Mapping[str, Any], weights: Sequence[float], transposed: Collection[str] = ()
    ) -> list[TaskGrams]:
        """Grams behind blocks merged by RegMean with its ``knobs``; what has no Gram is averaged."""
        options: dict[str, Any] = {"weights": weights, "device": self.device, "dtype": torch.float32}
        start = {}
        for name, mean in anchors.merge_stream("average", self.pool.base, self.pool.experts, **options):
            w0 = self.pool.base[name]
            start[name] = w0.float() + knobs["scale"] * (mean - w0.float()) if w0.is_floating_point() else mean

        def merge(grams: Sequence[TaskGrams]) -> StateDict:
            stacks = AnchorGrams(grams)
            if not stacks:
                return {}
            base = {n: self.pool.base[n] for n in stacks}
            experts = [{n: expert[n] for n in stacks} for expert in self.pool.experts]
            turned = [n for n in stacks if n in transposed]
            return anchors.merge("regmean", base, experts, grams=stacks, transposed=turned, **options, **knobs)

        return self._cached(start, merge, {"regmean": dict(knobs), "weights": list(weights)}, False)

    def _cached(self, start: StateDict, merge: MergeStep, settings: dict[str, Any], norms: bool) -> list[TaskGrams]:
        """`collect`, or what it gave before: the key covers all models, all inputs, the code and ``settings``."""
        models = f"{self.pool.fingerprint()} {fingerprint_tensors(start)}"
        code = [source_of(self.model), *(source_of(task.forward) for task in self.tasks)]
        common = fingerprint(models, flat(self.batches), {"merged": settings, "norms": norms, "code": code})
        keys = [fingerprint(common, [], {"task": n}) for n in range(len(self.tasks))]
        found = [grams for grams in map(self.store.load, keys) if grams is not None]
        if len(found) < len(keys):
            found = self.collect(start, merge, norms)
            for key, grams in zip(keys, found, strict=True):
                self.store.keep(key, grams)
        for notice in self.store.notices:
            self.progress("notice", 1, 1, notice)
        return found

    def collect(self, start: Mapping[str, Tensor], merge: MergeStep, norms: bool = False) -> list[TaskGrams]:
        """Grams of every task, each collected behind the blocks merged before.

        ``start`` is the merged model before its first block: what no Gram decides stays as it is there. ``norms`` adds
        the Grams of norms. Raises `GramError` for no calibration inputs, NaN and overflow among the activations.
        """
        stored = {own: name for name, own in self.in_model.items()}
        names = own_names(self.model, self.pool.float_names, self.in_model)
        state = {self._own(n): tensor for n, tensor in start.items()}
        steps = self._steps(state, names, norms)
        found = [TaskGrams() for _ in self.tasks]
        for done, (block, weights) in enumerate(steps):
            self.progress("grams", done, len(steps), block or weights[0])
            modules = {module_of(w) for w in weights}
            wanted = {n for n in names if module_of(n) in modules}
            inside = [n for n in self.pool.names if block and block_of(self._own(n)) == block]
            fresh = []
            for task, batches, expert in zip(self.tasks, self.batches, self.pool.experts, strict=True):
                tensors = state | {self._own(n): expert[n] for n in inside}
                with swapped(self.model, tensors, self.device), torch.inference_mode():
                    inputs = (to_device(batch, self.device) for batch in batches)
                    grams = collect(self.model, task.forward, inputs, names=wanted, norms=norms)
                fresh.append(grams.renamed(stored))
            state |= {self._own(n): tensor for n, tensor in merge(fresh).items()}
            found = [before.joined(new) for before, new in zip(found, fresh, strict=True)]
        self.progress("grams", len(steps), len(steps), "")
        return found

    def _steps(self, state: StateDict, names: Collection[str], norms: bool) -> list[tuple[str, tuple[str, ...]]]:
        """Blocks and their weights in order of execution, found by one batch of every task."""
        order: dict[tuple[str, ...], None] = {}
        with swapped(self.model, state, self.device), torch.inference_mode():
            for task, batches in zip(self.tasks, self.batches, strict=True):
                if not batches:
                    raise GramError(f"task {task.name!r}: no calibration batches", "give at least one batch of inputs")
                first = to_device(batches[0], self.device)
                order |= dict.fromkeys(reading_order(self.model, task.forward, first, names=names, norms=norms))
        return steps_of(list(order))

    def _own(self, name: str) -> str:
        return self.in_model.get(name, name)
