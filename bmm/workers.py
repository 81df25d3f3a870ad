"""From a run to what evaluates its trials: this process, or workers that share what was prepared (docs/parallel.md).

A worker opens the recipe for itself (the model's skeleton, tasks named FILE.py:FUNCTION) and maps what the leader has
computed: prepared modules, the experts' logits where these are the yardstick, and the data of tasks given as objects.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from .errors import RecipeError
from .evaluation import Task
from .evaluation.agreement import ExpertOutputs
from .loading import ModelBuilder, find_device
from .merging import PreparedModel
from .notation import StateDict
from .recipe import Recipe
from .records import Hyperparameters
from .run import Run
from .search.executor import Evaluate, Executor
from .search.parallel.cluster import Actors, require_ray
from .search.parallel.processes import Processes, refuse_while_imported
from .shared import Shared, names_main, share

NUMBERS = "prepared.tmp"
"""What workers map, in the run's folder while the study runs."""


def evaluator(run: Run, prepared: PreparedModel) -> Evaluate:
    """A trial: merge, and score on validation data, by task; task by task where a trial may be stopped."""

    def evaluate(point: Hyperparameters) -> Mapping[str, float]:
        merged = prepared.merge(point)
        if run.recipe.early_stopping:
            return ScoresOnDemand(run, merged)
        return {s.task: s.value for s in run.score(merged, "validation")}

    return evaluate


class ScoresOnDemand(Mapping[str, float]):
    """A merged model's validation scores by task, each measured when it is read."""

    def __init__(self, run: Run, tensors: StateDict) -> None:
        self._run, self._tensors = run, tensors
        self._tasks = {task.name: task for task in run.tasks}

    def __getitem__(self, task: str) -> float:
        return self._run.score(self._tensors, "validation", [self._tasks[task]])[0].value

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)


def has_workers(recipe: Recipe) -> bool:
    """Whether trials are evaluated elsewhere than in this process."""
    return recipe.workers > 1 or recipe.executor != "local"


def check_workers(recipe: Recipe, tasks: Sequence[Task] | None, model: ModelBuilder | None) -> None:
    """Raises `StudyError` or `RecipeError` for what cannot be done by workers, before any work is done for them."""
    if not has_workers(recipe):
        return
    ray = recipe.executor == "ray"
    if ray:
        require_ray()
        if recipe.device.startswith("cuda:"):
            raise RecipeError(f"device {recipe.device} with executor ray", "Ray hands out the GPUs: device: cuda")
    else:
        refuse_while_imported()
    for name, value in (("tasks", tasks), ("model", model)):
        hint = f"name functions at the top level of a module, or give {name} as FILE.py:FUNCTION, or take one worker"
        try:
            local = names_main(value)
        except Exception as error:  # pickle raises what the objects raise
            reason = f"{type(error).__name__}: {error}"
            raise RecipeError(f"the {name} cannot be sent to workers: {reason}", hint) from error
        import __main__

        if local and (ray or not hasattr(__main__, "__file__")):
            where = "the script itself" if ray else "an interactive session"
            raise RecipeError(f"the {name} use functions of {where}, where workers cannot find them", hint)


@contextlib.contextmanager
def evaluation(
    run: Run, prepared: PreparedModel, tasks: Sequence[Task] | None, model: ModelBuilder | None
) -> Iterator[Evaluate | Executor]:
    """What `bmm.search.study.run_study` takes: the run's own evaluation, or its workers, gone when the block ends.

    ``tasks`` and ``model`` are the objects given in place of the recipe's, as `Run` takes them.
    """
    recipe = run.recipe
    if not has_workers(recipe):
        yield evaluator(run, prepared)
        return
    file = Path(recipe.out) / NUMBERS
    try:
        site = Site(recipe, share((prepared, tasks, model, experts_logits(run)), file))
        notice = partial(run.progress, "notice", 1, 1)
        with _crew(site, notice) as crew:
            yield crew
    finally:
        with contextlib.suppress(OSError):
            file.unlink()


def _crew(site: Site, notice: partial[None]) -> Processes | Actors:
    size = site.recipe.workers
    if site.recipe.executor == "ray":
        gpus = site.recipe.device == "cuda"
        on_node = replace(site, shared=site.shared.as_array())
        return Actors(lambda cpus: replace(on_node, threads=cpus), size, notice, gpus=gpus)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, min(cores // size, torch.get_num_threads()))
    return Processes(replace(site, threads=threads, devices=devices_of(site.recipe.device)), size, notice)


def devices_of(name: str) -> tuple[str, ...]:
    """The devices that workers take in turn: every CUDA device where the recipe names none in particular."""
    device = find_device(name)
    if device.type == "cuda" and device.index is None:
        return tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))
    return (name,)


@dataclass(frozen=True)
class Site:
    """A worker's workplace: the recipe, what the leader shares, threads a worker, and the devices they take in turn."""

    recipe: Recipe
    shared: Shared
    threads: int = 1
    devices: tuple[str, ...] = ()

    def __call__(self, place: int) -> Evaluate:
        torch.set_num_threads(self.threads)
        device = self.devices[place % len(self.devices)] if self.devices else self.recipe.device
        prepared, tasks, model, logits = self.shared.open(device)
        run = Run(replace(self.recipe, device=device), tasks=tasks, model=model, check=False)
        for name, found in logits.items():
            outputs = run.judged[name].validation
            assert isinstance(outputs, ExpertOutputs)
            outputs.logits = found
        if not isinstance(self.shared.numbers, Path):
            # An object store's memory is read-only, and a model may write to its buffers.
            prepared = replace(prepared, rest={n: t.clone() for n, t in prepared.rest.items()})
        assert run.skeleton is not None  # built now: what is wrong with it is no trial's fault
        return evaluator(run, prepared)


def experts_logits(run: Run) -> dict[str, list[torch.Tensor]]:
    """Every expert's logits on its task's validation data, by task, where these are what trials are judged by."""
    found = {}
    for name, task in run.judged.items():
        assert isinstance(task.validation, ExpertOutputs)
        if task.validation.logits is not None:
            found[name] = task.validation.logits
    return found
