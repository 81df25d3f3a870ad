"""What methods need to know of the models besides their weights, from the cache where it is there: Fishers."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from . import anchors
from .anchors.anchor import named_generator
from .checkpoint import fingerprint_of
from .evaluation import Task, own_names, swapped
from .evaluation.task import to_device
from .fisher import FisherStore, Source, collect
from .fisher.collect import length, take
from .grams import GramStore, TaskGrams, fingerprint, gram_bytes, in_parts
from .grams import collect as collect_grams
from .grams.store import flat, source_of
from .notation import Tensors
from .recipe import Recipe

Store = TypeVar("Store", GramStore, FisherStore)
FISHER_VERSION = 1
"""Raise whenever the way Fishers are computed changes: older caches are then rebuilt."""


def cache_folder(recipe: Recipe) -> Path:
    """Where Grams and Fishers are cached: the recipe's, $BMM_CACHE, or ~/.cache/bmm."""
    return Path(recipe.cache or os.environ.get("BMM_CACHE", "") or Path.home() / ".cache" / "bmm")


def anchor_needs(anchor: str) -> frozenset[str]:
    """The statistics the anchor itself is made of; with any of them it needs tasks."""
    return frozenset() if anchor.startswith("path:") else anchors.get(anchor).needs


@dataclass
class _Collector(Generic[Store]):
    """Collects a statistic of models given as tensors by checkpoint name.

    Args:
        recipe: which inputs and labels, batch size and seed are read from it.
        skeleton: the model the tensors are swapped into.
        parameters: checkpoint names of the floating tensors.
        in_model: checkpoint name -> name in the model, where they differ.
        store: the cache.
        device: where the model runs.
    """

    recipe: Recipe
    skeleton: nn.Module
    parameters: Sequence[str]
    in_model: Mapping[str, str]
    store: Store
    device: torch.device

    def in_place(self, model: Tensors) -> contextlib.AbstractContextManager[nn.Module]:
        """The skeleton with the model's tensors in it."""
        tensors = {self.in_model.get(name, name): model[name] for name in model}
        return swapped(self.skeleton, tensors, self.device)


@dataclass
class GramCollector(_Collector[GramStore]):
    """Collects activation Grams.

    Where the recipe bounds the memory and a model's Grams take more than a third of it, the calibration inputs run
    through the model several times, each time for as many modules as fit; each such part is cached by itself.
    """

    def __post_init__(self) -> None:
        self.stored = {own: name for name, own in self.in_model.items()}
        self.norms = self.recipe.norms == "regression"
        self.names = own_names(self.skeleton, self.parameters, self.in_model)
        sizes = gram_bytes(self.skeleton, self.names)
        rest = self.names - sizes.keys()  # biases join their weights, wherever those are
        self.parts = [part | rest for part in in_parts(sizes, self.recipe.max_memory * 2**30 / 3)]

    def of(self, model: Tensors, task: Task) -> TaskGrams:
        """The Grams of one expert on its task's calibration inputs; they read from disk where the cache took them."""
        batches = list(task.calibration_batches(self.recipe.calibration, self.recipe.batch_size))
        settings: dict[str, Any] = {"code": source_of(task.forward), "model": source_of(self.skeleton)}
        if self.norms:
            settings["norms"] = True
        found: TaskGrams | None = None
        for part in self.parts:
            one = settings if len(self.parts) < 2 else settings | {"parameters": sorted(part)}
            fresh = self._part(fingerprint(fingerprint_of(model), flat(batches), one), model, task, batches, part)
            found = fresh if found is None else found.joined(fresh)
        assert found is not None
        return found

    def _part(self, key: str, model: Tensors, task: Task, batches: list[Any], names: set[str]) -> TaskGrams:
        known = self.store.load(key)
        if known is not None:
            return known
        with self.in_place(model), torch.inference_mode():
            inputs = (to_device(b, self.device) for b in batches)
            found = collect_grams(self.skeleton, task.forward, inputs, names=names, norms=self.norms)
        found = found.renamed(self.stored)
        self.store.keep(key, found)
        return self.store.load(key) or found


@dataclass
class Fishers(_Collector[FisherStore]):
    """Collects Fishers.

    ``sampled`` labels are drawn from the model by a generator keyed by seed, weights, inputs and code: they depend
    neither on the order of the tasks nor on the batch size of the computation.
    """

    def __post_init__(self) -> None:
        own = dict(self.skeleton.named_parameters(remove_duplicate=False))  # running statistics have no gradient
        self.names = {n: name for n in self.parameters if (name := self.in_model.get(n, n)) in own}
        self.kind = "true" if self.recipe.fisher == "true" else "sampled"

    def of(self, model: Tensors, tasks: Sequence[Task]) -> Tensors:
        """The Fisher of one model over the calibration inputs of ``tasks``, pooled; a mapping that reads from disk.

        Raises `RecipeError` where a task lacks what it takes (see `Task.require_labels`), `GramError` and `MergeError`
        as `bmm.fisher.collect` does. Where the cache cannot be written the Fisher stays in memory.
        """
        for task in tasks:
            task.require_labels(self.kind)
        weights = fingerprint_of(model)
        keys = [self._key(weights, task) for task in tasks]
        key = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()  # the order of the tasks does not matter
        found = self.store.load(key)
        if found is not None:
            return found
        sources = [self._source(task, digest) for task, digest in zip(tasks, keys, strict=True)]
        with self.in_place(model):
            collected = collect(self.skeleton, sources, names=set(self.names.values()))
        stored = {name: collected[own] for name, own in self.names.items()}
        self.store.keep(key, stored)  # read back from there, it takes no memory
        return self.store.load(key) or stored

    def _batches(self, task: Task) -> Iterator[tuple[Any, Any]]:
        most, size = self.recipe.calibration, self.recipe.batch_size
        if self.kind == "true":
            yield from task.labelled_calibration(most, size)
        else:
            for inputs in task.calibration_batches(most, size):
                yield inputs, None

    def _key(self, weights: str, task: Task) -> str:
        code = [source_of(f) for f in (task.forward, task.log_likelihood, task.sample)]
        bound = [v for f in (task.forward, task.log_likelihood, task.sample) for v in _bound(f, set())]
        settings = {
            "statistic": f"fisher {FISHER_VERSION}",
            "labels": self.kind,
            "seed": self.recipe.seed if self.kind == "sampled" else 0,
            "parameters": sorted(self.names.values()),
            "code": [*code, *(v for v in bound if isinstance(v, str))],
            "model": source_of(self.skeleton),
        }
        # example by example: how they come in batches does not matter
        examples = (take(pair, k, k + 1) for pair in self._batches(task) for k in range(length(pair)))
        tensors = (t for part in (examples, bound) for value in part for t in flat(value))
        return fingerprint(weights, tensors, settings)

    def _source(self, task: Task, digest: str) -> Source:
        batches = ((to_device(x, self.device), to_device(y, self.device)) for x, y in self._batches(task))
        generator = named_generator("fisher", digest)
        return Source(task.name, task.forward, batches, task.log_likelihood, task.sample, generator)


def _bound(thing: Any, seen: set[int]) -> Iterator[Tensor | str]:
    """Tensors and plain values a function carries along, such as a task's head.

    They may stand in the arguments of a partial, in defaults, in a closure or in attributes.
    """
    if isinstance(thing, Tensor):
        yield thing
    elif thing is None or isinstance(thing, str | int | float | bool):
        yield repr(thing)
    elif id(thing) not in seen:
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            yield from _bound(thing.state_dict(), seen)
        elif isinstance(thing, Mapping):
            for key in sorted(thing, key=str):
                yield str(key)
                yield from _bound(thing[key], seen)
        elif isinstance(thing, list | tuple):
            for item in thing:
                yield from _bound(item, seen)
        elif callable(thing):
            for part in ("func", "args", "keywords", "__self__", "__defaults__", "__kwdefaults__"):
                yield from _bound(getattr(thing, part, None), seen)
            for cell in getattr(thing, "__closure__", None) or ():
                with contextlib.suppress(ValueError):  # a cell that is still empty
                    yield from _bound(cell.cell_contents, seen)
            if not isinstance(thing, type):
                yield from _bound(getattr(thing, "__dict__", None), seen)
