"""From checkpoints to aligned checkpoints: specification, matching, barriers, files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import Checkpoint, write_checkpoint
from ..checkpoint.agreement import TiedView
from ..checkpoint.atomic import destination
from ..errors import RecipeError
from ..evaluation import Task, check_tasks
from ..evaluation.batchnorm import batchnorms
from ..evaluation.skeleton import stored_names
from ..functions import call_function
from ..loading import ModelBuilder
from ..notation import StateDict, Tensors
from ..progress import Progress, silent
from ..recipe import Recipe
from ..report import versions
from ..run import Run
from .barrier import Barrier, Loss, measure_barrier
from .build import check_preserved, example_runs, find_spec
from .matching import Matching, To, match
from .names import Transformer, Within
from .permutation import Permutation
from .spec import Spec, load_spec


@dataclass(frozen=True)
class Options:
    """How to align.

    Args:
        to: "first" or "mean", see `bmm.rebasin.match`.
        heads: number of attention heads, where config.json does not say.
        within: permutations inside attention heads: "none", "vo" or "qkvo", see `bmm.rebasin.names`.
        residual: permute a transformer's residual stream too; needs model and tasks.
        points: models on the line from reference to expert on which the barrier is measured.
        loss: one loss an input for the barrier; by default the cross-entropy of class logits.
    """

    to: To = "first"
    seed: int = 0
    heads: int | None = None
    within: Within = "none"
    residual: bool = False
    points: int = 11
    loss: Loss | None = None


@dataclass(frozen=True)
class Alignment:
    """What `align` found: permutations, how they were found, barriers, and where the aligned models lie."""

    experts: tuple[str, ...]
    spec: Spec
    matching: Matching
    barriers: dict[str, dict[str, Barrier]]
    """Expert -> "before" and "after", and for BatchNorm networks these "with statistics recomputed"."""
    paths: dict[str, str]
    _sources: Mapping[str, Tensors] = field(repr=False, compare=False)

    @property
    def permutations(self) -> dict[str, Permutation]:
        """Expert -> what was done to it."""
        return dict(zip(self.experts, self.matching.permutations, strict=True))

    def tensors(self, expert: str) -> StateDict:
        """An aligned expert's tensors, in the expert's own dtype."""
        return self.permutations[expert].apply(self._sources[expert])

    def to_json(self) -> dict[str, Any]:
        rows = zip(self.experts, self.matching.permutations, self.matching.similarity, strict=True)
        return {
            "experts": {
                name: {
                    "similarity_before": before,
                    "similarity_after": after,
                    "units_moved": permutation.moved,
                    "checkpoint": self.paths.get(name),
                    "barriers": {kind: b.to_json() for kind, b in self.barriers.get(name, {}).items()},
                }
                for name, permutation, (before, after) in rows
            },
            "objective": list(self.matching.history),
            "passes": self.matching.passes,
            "groups": {group.name: group.size for group in self.spec.groups},
            "notices": list(self.spec.notices),
        }


class Aligner:
    """Reference and experts opened, the network built where it is needed, the specification found and checked.

    Args:
        reference, experts: checkpoints, the experts by name.
        spec: a `Spec` or the path of one; found by names and tracing without.
        tasks, model: objects, or FILE.py:FUNCTION; the model of a folder with config.json needs none.
        skip, device: as in a recipe.

    Raises:
        RecipeError, CheckpointError: whatever is wrong with the input, before any matching.
    """

    def __init__(
        self,
        reference: str | Path,
        experts: Mapping[str, str | Path],
        *,
        spec: Spec | str | Path | None = None,
        tasks: Sequence[Task] | str | None = None,
        model: ModelBuilder | str | None = None,
        skip: Sequence[str] = (),
        device: str = "cpu",
        options: Options | None = None,
        progress: Progress = silent,
    ) -> None:
        self.options = options or Options()
        self.progress = progress
        keys: dict[str, Any] = {"model": model} if isinstance(model, str) else {}
        recipe = Recipe.from_dict(
            {"base": str(reference), "experts": {k: str(v) for k, v in experts.items()}, "skip": list(skip)}
            | keys | {"device": device}, "align",
        )  # fmt: skip
        builder = None if isinstance(model, str) else model
        self.run = Run(recipe, model=builder, progress=progress, need_tasks=False)
        self.pool = self.run.pool
        given = call_function(tasks, "tasks") if isinstance(tasks, str) else tasks
        self.tasks = check_tasks(given) if given is not None else []
        self._own: dict[str, str] = {}  # checkpoint name -> the model's, where they differ
        if self.tasks and recipe.model == "transformers" and builder is None:
            self._own = stored_names(self.run.skeleton)
        if self.options.residual and not self.tasks:
            raise RecipeError("residual needs the network traced", "give tasks, and model where there is no config")
        runs = example_runs(self.tasks, self.run.device)
        self.spec = self._spec(spec, runs)
        if self.tasks:
            reference_tensors = {n: self.pool.base[n] for n in self.pool.names}
            check_preserved(self.run.skeleton, reference_tensors, self.spec, runs, self.in_model, self.run.device)

    def _spec(self, given: Spec | str | Path | None, runs: Sequence[Callable[..., Tensor]]) -> Spec:
        shapes = {n: self.pool.shape(n) for n in self.pool.names}
        if given is not None:
            return (given if isinstance(given, Spec) else load_spec(given)).check(shapes)
        skeleton = self.run.skeleton if runs else None
        stored = {own: name for name, own in self._own.items()}
        transposed, names = set(), {}
        if skeleton is not None:
            modules = dict(skeleton.named_modules())
            transposed = {f"{n}.weight" for n, m in modules.items() if type(m).__name__ == "Conv1D"}
            for own in skeleton.state_dict():
                name = stored.get(own, own)
                names[own] = self.pool.aliases.get(name, name)
        config = self.pool.base.config if isinstance(self.pool.base, Checkpoint) else {}
        known = Transformer(
            shapes, config, {names[n] for n in transposed}, self.options.heads, self.options.within
        )  # fmt: skip
        return find_spec(known, skeleton, runs, names, self.options.residual)

    def in_model(self, tensors: Tensors) -> StateDict:
        """Tensors under all of the model's own names."""
        return {self._own.get(n, n): t for n, t in self.pool.with_ties(tensors).items()}

    def align(self, out: str | Path | None = None, overwrite: bool = False) -> Alignment:
        """Match, measure where there are tasks, and write where there is a place.

        Raises:
            WriteError: ``out`` is taken; found out before the matching.
        """
        places = {name: Path(out) / name for name in self.pool.tasks} if out is not None else {}
        opened = [m.path for m in map(_source, (self.pool.base, *self.pool.experts)) if isinstance(m, Checkpoint)]
        for place in places.values():
            destination(place, overwrite, tuple(opened))
        names = self.pool.names
        experts = [_Named(expert, names) for expert in self.pool.experts]
        matching = match(
            self.pool.base, experts, self.spec, to=self.options.to, seed=self.options.seed,
            progress=lambda done, total: self.progress("match", done, total),
        )  # fmt: skip
        barriers = self._barriers(matching) if self.tasks else {}
        found = Alignment(
            self.pool.tasks, self.spec, matching, barriers, {k: str(v) for k, v in places.items()},
            dict(zip(self.pool.tasks, experts, strict=True)),
        )  # fmt: skip
        for done, (name, place) in enumerate(places.items()):
            expert = self.pool.experts[done]
            like = _source(expert)
            write_checkpoint(
                place,
                found.permutations[name].stream(experts[done]),
                like=like if isinstance(like, Checkpoint) else None,
                tied=self.pool.tied,
                extra_files={"README.md": self._card(name, matching.similarity[done])},
                overwrite=overwrite,
            )
            self.progress("write", done + 1, len(places), name)
        return found

    def _barriers(self, matching: Matching) -> dict[str, dict[str, Barrier]]:
        skeleton, options = self.run.skeleton, self.options
        kinds = [(False, "")]
        if batchnorms(skeleton):
            if all(task.calibration is not None for task in self.tasks):
                kinds.append((True, ", statistics recomputed"))
            else:
                self.progress(
                    "notice", 1, 1, "a task has no calibration inputs: BatchNorm statistics are not recomputed"
                )
        reference = {n: self.pool.base[n] for n in self.pool.names}
        found: dict[str, dict[str, Barrier]] = {}
        for name, expert, permutation in zip(self.pool.tasks, self.pool.experts, matching.permutations, strict=True):
            before = {n: expert[n] for n in self.pool.names}
            pair = {"before": before, "after": permutation.apply(before)}
            found[name] = {
                state + kind: measure_barrier(
                    skeleton, self.in_model(reference), self.in_model(tensors), self.tasks,
                    points=options.points, loss=options.loss, recompute=recompute, device=self.run.device,
                )
                for recompute, kind in kinds
                for state, tensors in pair.items()
            }  # fmt: skip
            self.progress("barrier", len(found), len(self.pool), name)
        return found

    def _card(self, name: str, similarity: tuple[float, float]) -> str:
        used = ", ".join(f"{k} {v}" for k, v in versions().items())
        recipe = self.run.recipe
        target = "the reference" if self.options.to == "first" else "the mean of the reference and the other experts"
        return (
            f"---\ntags: [merge, bmm, git-re-basin]\nlibrary_name: bmm-tuner\n---\n\n# {name}, aligned\n\n"
            f"`{recipe.experts[name]}` with its units permuted to match {target} (Git Re-Basin, arXiv 2209.04836); "
            f"the same function as before. Reference: `{recipe.base}`. {date.today().isoformat()}.\n\n"
            f"Cosine with the reference over the permuted tensors: {similarity[0]:.4f} before, {similarity[1]:.4f} "
            f"after. {len(self.spec.groups)} groups of units; seed {self.options.seed}; versions: {used}.\n"
        )


class _Named(Mapping[str, Tensor]):
    """The tensors of the given names, read on access."""

    def __init__(self, tensors: Tensors, names: Sequence[str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _source(tensors: Tensors) -> Tensors:
    return tensors.source if isinstance(tensors, TiedView) else tensors
