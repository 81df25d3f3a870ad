"""The road from a recipe to scored models: open, collect, anchor, prepare, search, write.

`Run` holds what is opened once; each step is a method that reports progress through a callback and prints nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import anchors, zoo
from .checkpoint import ModelPool
from .errors import RecipeError, WriteError
from .evaluation import Task, check_skeleton, check_tasks, judged_by_experts, score_tasks, split_validation
from .evaluation.outputs import SteadyBatches, task_outputs
from .fisher import FisherStore
from .grams import GramStore, TaskGrams
from .layouts import transposed_weights
from .loading import ModelBuilder, build_model, find_device, find_tasks, fit_vocabulary, open_pool, with_groups
from .merging import AnchorGrams, PreparedModel, prepare_model
from .notation import StateDict, Tensors
from .progress import Progress, silent
from .recipe import Recipe
from .records import Score
from .search.goal import Goal, check_names
from .sequential import MergedInputs
from .statistics import Fishers, GramCollector, anchor_needs, cache_folder

T = TypeVar("T")


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
        self.progress = progress
        self.device = find_device(recipe.device)
        base, experts = recipe.base, dict(recipe.experts)
        if not base and not experts:
            opened = zoo.find(recipe.zoo or "vit8")
            base, experts = str(opened.base), {k: str(v) for k, v in opened.experts.items()}
            if tasks is None and not recipe.tasks:
                tasks = opened.tasks()
            model = model or zoo.model
        if not base or not experts:
            raise RecipeError("base and experts go together", "give both, or neither for the embedded zoo")
        self.pool = open_pool(recipe, base, experts, progress)
        self.recipe = recipe = with_groups(recipe, self.pool)
        self.experts = list(experts)
        unknown = set(recipe.weights) - set(experts)
        if unknown:
            raise RecipeError(f"weights for unknown tasks {', '.join(sorted(unknown))}", f"tasks: {', '.join(experts)}")
        self.weights = [recipe.weights.get(name, 1.0) for name in self.experts]
        check_names(recipe.floor, recipe.objectives, dict(zip(self.experts, self.weights, strict=True)))
        if tasks is None and recipe.tasks:
            tasks = find_tasks(recipe.tasks, base)
        if tasks is None and need_tasks:
            raise RecipeError(
                "no tasks to score the merge on or to calibrate it with",
                "give tasks: FILE.yaml or FILE.py:FUNCTION",
            )
        self.tasks: list[Task] = []  # without the held-out validation inputs
        self.held: list[Task] = []  # the same tasks with the held-out ones alone
        if tasks is not None:
            by_name = {t.name: t for t in check_tasks(tasks, self.experts, labels=recipe.score_by == "labels")}
            self.tasks, self.held = split_validation([by_name[n] for n in self.experts], recipe.holdout, recipe.seed)
        agree = recipe.score_by == "agreement"
        self.judged = judged_by_experts(self.tasks, self.pool.experts, self.outputs) if agree and self.tasks else {}
        self.unwritten: list[WriteError] = []  # Grams that could not be cached
        self._own_scores: dict[str, list[Score]] = {}
        self.builder = model
        self._skeleton: nn.Module | None = None
        self._in_model: dict[str, str] = {}  # checkpoint name -> model name, where they differ
        self._stored: dict[str, str] = {}  # and back
        if check:
            self.pool.check_finite(lambda done, total: progress("check", done, total))

    @property
    def skeleton(self) -> nn.Module:
        """The model the tensors are swapped into, built once and checked against the checkpoints."""
        if self._skeleton is None:
            model, names = build_model(self.builder, self.recipe.model, self.recipe.base, self.pool.base)
            fit_vocabulary(model, self.pool)
            self._in_model = {stored: own for stored, own in names.items() if stored != own}
            self._stored = {own: stored for stored, own in self._in_model.items()}
            shapes = self._renamed(self.pool.with_ties({n: self.pool.shape(n) for n in self.pool.names}))
            check_skeleton(model, list(shapes), shapes, self.recipe.skip)
            self._skeleton = model.to(self.device).eval().requires_grad_(False)
        return self._skeleton

    def _renamed(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """The same values under the model's names."""
        return {self._in_model.get(name, name): value for name, value in tensors.items()}

    # -- Grams ---------------------------------------------------------------------------------------------------

    def collect_grams(self) -> list[TaskGrams]:
        """Activation Grams of every expert on its task's calibration inputs, from the cache where they are there."""
        skeleton, store = self.skeleton, GramStore(cache_folder(self.recipe) / "grams", self.unwritten)
        collector = GramCollector(self.recipe, skeleton, self.pool.float_names, self._in_model, store, self.device)
        found = []
        for done, (task, expert) in enumerate(zip(self.tasks, self.pool.experts, strict=True)):
            self.progress("grams", done, len(self.tasks), task.name)
            found.append(collector.of(expert, task))
        self.progress("grams", len(self.tasks), len(self.tasks))
        for notice in store.notices:  # a stale or damaged cache was rebuilt
            self.progress("notice", 1, 1, notice)
        return found

    def _merged_inputs(self) -> MergedInputs:
        """What Grams of the merged model's own inputs are collected with."""
        recipe = self.recipe
        return MergedInputs(
            self.skeleton,
            self.pool,
            self.tasks,
            [list(task.calibration_batches(recipe.calibration, recipe.batch_size)) for task in self.tasks],
            GramStore(cache_folder(self.recipe) / "grams", self.unwritten),
            self._in_model,
            self.device,
            self.progress,
        )

    # -- Fishers -------------------------------------------------------------------------------------------------

    def collect_fishers(self) -> list[Tensors]:
        """Every expert's Fisher on its task's calibration inputs, from the cache where they are there.

        The mappings read from disk on access: no Fisher is held in memory.
        """
        return self._fishers([([task], e) for task, e in zip(self.tasks, self.pool.experts, strict=True)], "fisher")

    def collect_base_fisher(self) -> Tensors:
        """The base's Fisher on the calibration inputs of all tasks, as `collect_fishers`."""
        return self._fishers([(self.tasks, self.pool.base)], "base fisher")[0]

    def _fishers(self, wanted: Sequence[tuple[Sequence[Task], Tensors]], stage: str) -> list[Tensors]:
        skeleton, store = self.skeleton, FisherStore(cache_folder(self.recipe) / "fisher")
        collector = Fishers(self.recipe, skeleton, self.pool.float_names, self._in_model, store, self.device)
        found = []
        for done, (tasks, model) in enumerate(wanted):
            self.progress(stage, done, len(wanted), tasks[0].name if len(tasks) == 1 else "")
            found.append(collector.of(model, tasks))
        self.progress(stage, len(wanted), len(wanted))
        for notice in collector.store.notices:  # a stale or damaged cache was rebuilt
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
        out = {}
        for done, (key, tensor) in enumerate(self.anchor_pairs(name, knobs, grams, strict)):
            out[key] = tensor
            self.progress("anchor", done + 1, len(self.pool.names), name or self.recipe.anchor)
        return out

    def anchor_pairs(
        self,
        name: str | None = None,
        knobs: Mapping[str, Any] | None = None,
        grams: Sequence[TaskGrams] | None = None,
        strict: bool = False,
        done: Collection[str] = (),
    ) -> Iterator[tuple[str, Tensor]]:
        """`anchor`, tensor by tensor, but for the names ``done``."""
        name = name or self.recipe.anchor
        knobs = self.recipe.knobs if knobs is None else knobs
        if not name.startswith("path:"):
            return self.anchor_stream(name, knobs, grams, torch.float32, strict, done)
        given = self.pool.open_model(name.removeprefix("path:"), self.recipe.skip)
        pool = ModelPool(self.pool.base, [given], task_names=["anchor"])
        pool.check_finite()
        return ((n, _widen(pool.experts[0][n])) for n in self.pool.names if n not in done)

    def anchor_stream(
        self,
        name: str,
        knobs: Mapping[str, Any],
        grams: Sequence[TaskGrams] | None = None,
        dtype: torch.dtype | None = None,
        strict: bool = False,
        done: Collection[str] = (),
    ) -> Iterator[tuple[str, Tensor]]:
        """A registered merge, tensor by tensor but for the names ``done``, reading each from disk as it comes.

        Task weights enter where the method takes them; ``strict`` refuses them where it does not.
        """
        weighted = any(a != 1 for a in self.weights) and (strict or anchors.get(name).weights)
        return anchors.merge_stream(
            name,
            self.pool.base,
            self.pool.experts,
            weights=self.weights if weighted else None,
            **self.statistics(name, grams, knobs),
            transposed=self._transposed(),
            device=self.device,
            dtype=dtype,
            done=done,
            **knobs,
        )

    def statistics(
        self, name: str, grams: Sequence[TaskGrams] | None = None, knobs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """What the method needs besides the weights, as keyword arguments of `bmm.anchors.merge_stream`."""
        anchor, found = anchors.get(name), dict[str, Any]()
        if "grams" in anchor.needs:
            found["grams"] = AnchorGrams(grams if grams is not None else self.collect_grams())
        if "fisher" in anchor.needs or ("fisher" in anchor.takes and self.recipe.fisher != "auto"):
            found["fisher"] = self.collect_fishers()
        if "base_fisher" in anchor.needs:
            found["base_fisher"] = self.collect_base_fisher()
        if "score" in anchor.needs:
            found["score"] = self.objective()
        if "sequential_grams" in anchor.needs:
            values = anchors.resolve_knobs(anchor, knobs or {})
            behind = self._merged_inputs().behind_regmean(values, self.weights, self._transposed())
            found["grams"] = AnchorGrams(behind)
        return found

    def objective(self) -> Callable[[Tensors], float]:
        """What the search maximises, as a function of a model's tensors: the recipe's goal on validation scores, floors
        aside. Experts are scored at once; each call reports progress as "candidates"."""
        recipe, reference = self.recipe, {s.task: s.value for s in self.score_experts("validation")}
        weights = dict(zip(self.experts, self.weights, strict=True))
        goal = Goal.of(reference, weights, recipe.goal, objectives=recipe.objectives)
        calls = itertools.count(1)

        def objective(tensors: Tensors) -> float:
            scores = {s.task: s.value for s in self.score(tensors, "validation")}
            self.progress("candidates", done := next(calls), max(done, 2 * len(self.experts) - 1))
            return goal.value(scores)

        return objective

    def _transposed(self) -> list[str]:
        model = self.skeleton if self.builder or self.recipe.tasks or self.tasks else None
        return transposed_weights(self.pool, model, self._stored)

    def prepare(self) -> PreparedModel:
        """Anchor, Grams and decompositions: everything that does not depend on (lam, rho)."""
        recipe = self.recipe
        anchor, grams = self.evidence()
        return prepare_model(
            self.pool,
            anchor,
            grams,
            **self.regression(),
            search=recipe.search,
            scheme=recipe.groups,
            bands=recipe.bands,
            overrides=recipe.group,
            device=self.device,
            progress=lambda done, total: self.progress("prepare", done, total),
        )

    def evidence(self) -> tuple[StateDict, list[TaskGrams] | None]:
        """The anchor, and the Grams of the recipe's ``inputs`` (none with data-free ones)."""
        recipe = self.recipe
        recipe.require_evidence()
        own = recipe.grams != "datafree" and recipe.inputs == "experts"
        grams = self.collect_grams() if own or "grams" in anchor_needs(recipe.anchor) else None
        anchor = self.anchor(grams=grams)
        if own or recipe.grams == "datafree":
            return anchor, grams if own else None
        return anchor, self._merged_inputs().behind_bmm(anchor, self.regression(), recipe.norms == "regression")

    def regression(self) -> dict[str, Any]:
        """The recipe's part in what one module's regression is, as `prepare_model` takes it."""
        recipe = self.recipe
        return {
            "source": recipe.grams,
            "gamma": recipe.gamma,
            "weights": self.weights,
            "normalise": recipe.normalise,
            "bias": recipe.bias,
            "transposed": self._transposed(),
        }

    # -- scores --------------------------------------------------------------------------------------------------

    def score(self, tensors: Tensors, split: Any = "validation", tasks: Sequence[Task] | None = None) -> list[Score]:
        """Scores of one model on every task (or the given ones): on validation data what the recipe's ``score_by``
        says, else the tasks' own."""
        asked = self.tasks if tasks is None else tasks
        judged = [self.judged.get(t.name, t) for t in asked] if split == "validation" else asked
        return score_tasks(tasks=judged, split=split, **self.loaded(tensors))

    def outputs(self, tensors: Tensors, task: Task, batches: SteadyBatches, finite: bool = True) -> list[Tensor]:
        """The logits of one model, batch by batch; see `task_outputs`."""
        return task_outputs(task=task, batches=batches, finite=finite, **self.loaded(tensors))

    def loaded(self, tensors: Tensors) -> dict[str, Any]:
        """What `score_tasks` and `task_outputs` need to run these tensors."""
        skeleton = self.skeleton  # before the names: building it finds its own
        named = self._renamed(self.pool.with_ties(tensors))
        return {"model": skeleton, "tensors": named, "device": self.device, "autocast": self.recipe.autocast}

    def score_experts(self, split: Any = "validation") -> list[Score]:
        """Each task's score by its own expert, measured once a split."""
        if split in self._own_scores:
            return self._own_scores[split]
        scores: list[Score] = []
        for done, (task, expert) in enumerate(zip(self.tasks, self.pool.experts, strict=True)):
            scores += self.score(expert, split, [task])
            self.progress("experts", done + 1, len(self.tasks), split)
        self._own_scores[split] = scores
        return scores

    @property
    def has_test(self) -> bool:
        return all(task.test is not None for task in self.tasks)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
