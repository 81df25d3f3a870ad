"""Tasks judged by a run of lm-evaluation-harness (``pip install 'bmm-tuner[lm-eval]'``)."""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import RecipeError
from ..evaluation import Task
from .function import function_task
from .text import load_tokenizer

FEWSHOT_SEED = 1234
"""Draws the examples of a prompt; the harness's own."""


@dataclass(frozen=True)
class Harness:
    """A judge: the mean of one metric over tasks of lm-evaluation-harness, each counting alike.

    Args:
        tasks: names the harness knows; of a group or a tag every task in it.
        tokenizer: the folder the tokenizer is loaded from.
        metric: "acc", "acc_norm", "exact_match", ...; higher is better. Of several filters the first, or the one that
            is named ("exact_match,flexible-extract").
        first, last: documents of each task to use, [first, last), or up to its end: disjoint ranges keep validation and
            test apart.
        shots: examples in the prompt.
        batch_size: of the harness.
        include: a folder with definitions of further tasks.

    Raises `RecipeError` before any model runs where the harness is not installed, a task or its metric is not there,
    or has no documents in the range.
    """

    tasks: tuple[str, ...]
    tokenizer: str | Path
    metric: str = "acc"
    first: int = 0
    last: int = 100
    shots: int = 0
    batch_size: int = 8
    include: str | Path = ""

    def __post_init__(self) -> None:
        if not self.tasks or not 0 <= self.first < self.last:
            raise RecipeError(f"lm_eval: tasks {list(self.tasks)}, documents {self.first} to {self.last}", "give both")
        for name, task in self._loaded().items():
            known, bare = task.higher_is_better(), self.metric.partition(",")[0]
            if bare not in known:
                raise RecipeError(f"lm_eval: {name} has no metric {bare!r}", f"it has {', '.join(known)}")
            if not known[bare]:
                raise RecipeError(f"lm_eval: of {bare}, a lower value of {name} is the better one", "another metric")
            if len(task.eval_docs) <= self.first:
                raise RecipeError(
                    f"lm_eval: {name} has {len(task.eval_docs)} documents, none from number {self.first} on",
                    "give validation and test ranges [first, last) inside of them",
                )

    def _loaded(self) -> dict[str, Any]:
        return _loaded_tasks(self.tasks, str(self.include), self.shots)

    def __call__(self, model: nn.Module) -> float:
        lm_eval, wrapper = _harness()
        if not hasattr(model, "config"):
            raise RecipeError(f"lm_eval: {type(model).__name__} is no model of transformers", "model: transformers")
        tokenizer, tasks = load_tokenizer(self.tokenizer), self._loaded()
        with _quiet():
            found = lm_eval.evaluate(
                lm=wrapper(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size),
                task_dict={"tasks": tasks, "groups": {}},
                samples={name: self._documents(task) for name, task in tasks.items()},
                bootstrap_iters=0,
                log_samples=False,
            )
        return sum(self._value(found["results"][name], name) for name in tasks) / len(tasks)

    def _documents(self, task: Any) -> list[int]:
        return list(range(self.first, min(self.last, len(task.eval_docs))))

    def _value(self, results: dict[str, Any], task: str) -> float:
        values = {key: value for key, value in results.items() if "," in key and isinstance(value, int | float)}
        for key, value in values.items():
            if self.metric in (key, key.partition(",")[0]):
                return float(value)
        raise RecipeError(f"lm_eval: {task} has no metric {self.metric!r}", f"it has {', '.join(values)}")


@functools.lru_cache(maxsize=32)
def _loaded_tasks(names: tuple[str, ...], include: str, shots: int) -> dict[str, Any]:
    """The harness's tasks by name, those of groups and tags one by one; read once a process."""
    manager = _manager(include)
    try:
        tasks: dict[str, Any] = manager.load(list(names))["tasks"]
    except Exception as error:
        if unknown := [name for name in names if name not in manager.all_tasks]:
            close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists them"
            raise RecipeError(f"lm_eval: no task {unknown[0]!r}", hint) from error
        text = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"lm_eval: {', '.join(names)} cannot be loaded: {type(error).__name__}: {text}",
            "is the data set there, or the network?",
        ) from error
    for name, task in tasks.items():
        if task.get_config("num_fewshot") == 0 and shots:
            raise RecipeError(f"lm_eval: {name} takes no examples in its prompt", "shots: 0")
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return tasks


@functools.cache
def _manager(include: str) -> Any:
    """Knows all tasks: it reads some ten thousand files to that end."""
    _harness()
    if include and not Path(include).is_dir():
        raise RecipeError(f"lm_eval: include: no folder {include}", "a folder with YAML files of the harness")
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include or None)


def _harness() -> tuple[Any, Any]:
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise RecipeError("lm_eval tasks need lm-evaluation-harness", "pip install 'bmm-tuner[lm-eval]'") from error
    return lm_eval, HFLM


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's bars and advice, which would come again with every trial."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def harness_task(
    name: str,
    tasks: Sequence[str],
    tokenizer: str | Path,
    *,
    metric: str = "acc",
    validation: tuple[int, int] = (0, 100),
    test: tuple[int, int] | None = None,
    shots: int = 0,
    batch_size: int = 8,
    include: str | Path = "",
) -> Task:
    """A task scored by lm-evaluation-harness on the documents [first, last) of each of ``tasks``, see `Harness`.

    Raises `RecipeError` as `Harness` does, and where the two ranges overlap.
    """
    if test is not None and max(validation[0], test[0]) < min(validation[1], test[1]):
        raise RecipeError(f"lm_eval: documents {validation} and {test} overlap", "test what the search has not seen")

    def judge(span: tuple[int, int]) -> Harness:
        return Harness(tuple(tasks), tokenizer, metric, *span, shots=shots, batch_size=batch_size, include=include)

    return function_task(name, judge(validation), judge(test) if test else None)
