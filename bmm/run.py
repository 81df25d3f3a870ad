"""The road from a recipe to scored models: open, collect, anchor, prepare, search, write.

`Run` holds what is opened once; each step is a method that reports progress through a callback and prints nothing.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from . import anchors, zoo
from .checkpoint import Checkpoint, ModelPool, fingerprint_tensors, open_checkpoint
from .errors import RecipeError, WriteError
from .evaluation import Task, check_skeleton, check_tasks, score_tasks, swapped
from .evaluation.skeleton import from_transformers
from .evaluation.task import to_device
from .grams import GramStore, TaskGrams, collect, fingerprint
from .merging import PreparedModel, anchor_grams, prepare_model
from .notation import StateDict, Tensors
from .recipe import Recipe, load_function
from .records import Score

ModelBuilder = Callable[[], nn.Module]
T = TypeVar("T")


class Progress(Protocol):
    """Called as work goes on: a stage's name, how much of it is done, and a short detail.

    Stage "notice" carries, in ``detail``, something the user should know that stopped nothing.
    """

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None: ...


def silent(stage: str, done: int, total: int, detail: str = "") -> None:
    """Progress nobody looks at."""


def cache_folder(recipe: Recipe) -> Path:
    """Where Grams are cached: the recipe's, $BMM_CACHE, or ~/.cache/bmm."""
    return Path(recipe.cache or os.environ.get("BMM_CACHE", "") or Path.home() / ".cache" / "bmm")


def anchor_needs(anchor: str) -> frozenset[str]:
    """The statistics the anchor itself is made of; with any of them it needs tasks."""
    return frozenset() if anchor.startswith("path:") else anchors.get(anchor).needs


class Run:
    """A recipe opened: base and experts that agree, tasks that can be scored, a model to run them in.

    Args:
        recipe: what to do.
        tasks: `Task` objects in place of the recipe's ``tasks``.
        model: builds the skeleton, in place of the recipe's ``model``.
        progress: see `Progress`.
        check: read all weights once and refuse NaN and Inf now; without it, whoever reads them must.

    Raises:
        RecipeError, CheckpointError: whatever is wrong with the input, before any work.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        tasks: Sequence[Task] | None = None,
        model: ModelBuilder | None = None,
        progress: Progress = silent,
        need_tasks: bool = True,
        check: bool = True,
    ) -> None:
        self.recipe = recipe
        self.progress = progress
        self.device = _device(recipe.device)
        base, experts = recipe.base, dict(recipe.experts)
        if not base and not experts:
            opened = zoo.find(recipe.zoo or "vit8")
            base, experts = str(opened.base), {k: str(v) for k, v in opened.experts.items()}
            if tasks is None and not recipe.tasks:
                tasks = opened.tasks()
            model = model or zoo.model
        if not base or not experts:
            raise RecipeError("base and experts go together", "give both, or neither for the embedded zoo")
        self.pool = ModelPool.open(base, list(experts.values()), skip=recipe.skip, task_names=list(experts))
        self.experts = list(experts)
        unknown = set(recipe.weights) - set(experts)
        if unknown:
            raise RecipeError(f"weights for unknown tasks {', '.join(sorted(unknown))}", f"tasks: {', '.join(experts)}")
        self.weights = [recipe.weights.get(name, 1.0) for name in self.experts]
        if tasks is None and recipe.tasks:
            tasks = load_function(recipe.tasks, "tasks")()
        if tasks is None and need_tasks:
            raise RecipeError("no tasks to score the merged model on", "give tasks: FILE.py:FUNCTION")
        self.tasks: list[Task] = []
        if tasks is not None:
            by_name = {t.name: t for t in check_tasks(tasks, self.experts)}
            self.tasks = [by_name[name] for name in self.experts]
        self._builder = model
        self._skeleton: nn.Module | None = None
        self._in_model: dict[str, str] = {}  # checkpoint name -> model name, where they differ
        self._stored: dict[str, str] = {}  # and back
        if check:
            self.pool.check_finite(lambda done, total: progress("check", done, total))

    @property
    def skeleton(self) -> nn.Module:
        """The model the tensors are swapped into, built once and checked against the checkpoints."""
        if self._skeleton is None:
            names: dict[str, str] = {}
            if self._builder is not None:
                model = self._builder()
            elif self.recipe.model == "transformers":
                model, names = from_transformers(self.recipe.base)
            else:
                model = load_function(self.recipe.model, "model")()
            if not isinstance(model, nn.Module):
                raise RecipeError(f"model returned {type(model).__name__}", "it must return a torch.nn.Module")
            self._in_model = {stored: own for stored, own in names.items() if stored != own}
            self._stored = {own: stored for stored, own in self._in_model.items()}
            shapes = self._renamed(self.pool.with_ties({n: self.pool.shape(n) for n in self.pool.names}))
            check_skeleton(model, list(shapes), shapes)
            self._skeleton = model.to(self.device).eval().requires_grad_(False)
        return self._skeleton

    def _renamed(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """The same values under the model's names."""
        return {self._in_model.get(name, name): value for name, value in tensors.items()}

    # -- Grams ---------------------------------------------------------------------------------------------------

    def collect_grams(self) -> list[TaskGrams]:
        """Activation Grams of every expert on its task's calibration inputs, from the cache where they are there."""
        store = GramStore(cache_folder(self.recipe) / "grams")
        skeleton = self.skeleton
        names = {self._in_model.get(n, n) for n in self.pool.float_names}
        found = []
        for done, (task, expert) in enumerate(zip(self.tasks, self.pool.experts, strict=True)):
            self.progress("grams", done, len(self.tasks), task.name)
            batches = list(task.calibration_batches(self.recipe.calibration, self.recipe.batch_size))
            weights = expert.fingerprint() if isinstance(expert, Checkpoint) else fingerprint_tensors(expert)
            key = fingerprint(weights, _flat(batches), {"code": _source(task.forward), "model": _source(skeleton)})
            grams = store.load(key)
            if grams is None:
                with swapped(skeleton, self._renamed(expert), self.device), torch.inference_mode():
                    inputs = (to_device(b, self.device) for b in batches)
                    grams = collect(skeleton, task.forward, inputs, names=names).renamed(self._stored)
                with contextlib.suppress(OSError, WriteError):  # a cache that cannot be written costs time, not the run
                    store.save(key, grams)
            found.append(grams)
        self.progress("grams", len(self.tasks), len(self.tasks))
        for notice in store.notices:  # a stale or damaged cache was rebuilt
            self.progress("notice", 1, 1, notice)
        return found

    # -- merges --------------------------------------------------------------------------------------------------

    def anchor(
        self,
        name: str | None = None,
        knobs: Mapping[str, Any] | None = None,
        grams: Sequence[TaskGrams] | None = None,
        strict: bool = False,
    ) -> StateDict:
        """The anchor's tensors in float32: a registered merge (`anchor_stream`) or a checkpoint (``path:FOLDER``)."""
        name = name or self.recipe.anchor
        knobs = self.recipe.knobs if knobs is None else knobs
        if name.startswith("path:"):
            given = open_checkpoint(name.removeprefix("path:"), skip=self.recipe.skip)
            pool = ModelPool(self.pool.base, [given], task_names=["anchor"])
            pool.check_finite()
            return {n: _widen(pool.experts[0][n]) for n in self.pool.names}
        out = {}
        for done, (key, tensor) in enumerate(self.anchor_stream(name, knobs, grams, torch.float32, strict)):
            out[key] = tensor
            self.progress("anchor", done + 1, len(self.pool.names), name)
        return out

    def anchor_stream(
        self,
        name: str,
        knobs: Mapping[str, Any],
        grams: Sequence[TaskGrams] | None = None,
        dtype: torch.dtype | None = None,
        strict: bool = False,
    ) -> Iterator[tuple[str, Tensor]]:
        """A registered merge, tensor by tensor, reading each from disk as it comes.

        Task weights enter where the method takes them; ``strict`` refuses them where it does not.
        """
        weighted = any(a != 1 for a in self.weights) and (strict or anchors.get(name).weights)
        return anchors.merge_stream(
            name,
            self.pool.base,
            self.pool.experts,
            weights=self.weights if weighted else None,
            **self.statistics(name, grams),
            transposed=self._transposed(),
            device=self.device,
            dtype=dtype,
            **knobs,
        )

    def statistics(self, name: str, grams: Sequence[TaskGrams] | None = None) -> dict[str, Any]:
        """What the method needs besides the weights, as keyword arguments of `bmm.anchors.merge_stream`."""
        found: dict[str, Any] = {}
        if "grams" in anchors.get(name).needs:
            found["grams"] = anchor_grams(grams if grams is not None else self.collect_grams())
        return found

    def _transposed(self) -> list[str]:
        """Weights stored (in, out): transformers' Conv1D, where there is a model to look into."""
        if self._builder is None and not self.recipe.tasks and not self.tasks:
            return []
        modules = self.skeleton.named_modules()
        weights = [f"{n}.weight" for n, m in modules if type(m).__name__ == "Conv1D"]
        names = [self._stored.get(w, w) for w in weights]
        return [n for n in names if n in self.pool.base]

    def prepare(self) -> PreparedModel:
        """Anchor, Grams and decompositions: everything that does not depend on (lam, rho)."""
        recipe = self.recipe
        recipe.require_evidence()
        needs = recipe.grams != "datafree" or "grams" in anchor_needs(recipe.anchor)
        grams = self.collect_grams() if needs else None
        return prepare_model(
            self.pool,
            self.anchor(grams=grams),
            grams if recipe.grams != "datafree" else None,
            source=recipe.grams,
            gamma=recipe.gamma,
            weights=self.weights,
            normalise=recipe.normalise,
            scheme=recipe.groups,
            bands=recipe.bands,
            overrides=recipe.group,
            device=self.device,
            progress=lambda done, total: self.progress("prepare", done, total),
        )

    # -- scores --------------------------------------------------------------------------------------------------

    def score(self, tensors: Tensors, split: Any = "validation", tasks: Sequence[Task] | None = None) -> list[Score]:
        """Scores of one model on every task (or the given ones)."""
        return score_tasks(
            self.skeleton,
            self._renamed(self.pool.with_ties(tensors)),
            self.tasks if tasks is None else tasks,
            split,
            device=self.device,
            autocast=self.recipe.autocast,
        )

    def score_experts(self, split: Any = "validation") -> list[Score]:
        """Each task's score by its own expert."""
        scores = []
        for done, (task, expert) in enumerate(zip(self.tasks, self.pool.experts, strict=True)):
            scores += self.score(expert, split, [task])
            self.progress("experts", done + 1, len(self.tasks), split)
        return scores

    @property
    def has_test(self) -> bool:
        return all(task.test is not None for task in self.tasks)


@contextlib.contextmanager
def stopwatch(into: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds spent inside to ``into[name]``."""
    start = time.perf_counter()
    try:
        yield
    finally:
        into[name] = into.get(name, 0.0) + time.perf_counter() - start


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"no device {name!r}", "cpu, cuda, cuda:1, mps ...") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"device {name}: this torch sees no CUDA device", "use device: cpu, or a CUDA build of torch")
    return device


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _flat(batches: Any) -> Iterator[Tensor]:
    if isinstance(batches, Tensor):
        yield batches
    elif isinstance(batches, Mapping):
        for key in sorted(batches):
            yield from _flat(batches[key])
    elif isinstance(batches, list | tuple):
        for item in batches:
            yield from _flat(item)


def _source(thing: Any) -> str:
    """What the code of a function or of a module's class is, so that changing it invalidates what it produced."""
    kind = type(thing) if isinstance(thing, nn.Module) else inspect.unwrap(getattr(thing, "func", thing))
    with contextlib.suppress(OSError, TypeError):
        return inspect.getsource(kind)
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', repr(kind))}"


__all__ = ["ModelBuilder", "Progress", "Run", "anchor_needs", "cache_folder", "silent", "stopwatch"]
