"""Calibrated predictions from the posterior over a tuned merge's weights (arXiv 2605.12843, appendix).

Every module's weights have a Gaussian posterior around the merge, with row covariance ``sigma^2 (G + lam I)^-1`` (see
`bmm.solver`). Averaging the softmax of models drawn from it gives probabilities that know how little the data say about
some directions. ``sigma`` is one number for the whole model, the one with the least negative log-likelihood of the
averaged probabilities on validation data, the mean over tasks; test data are looked at once, when it is fixed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .anchors.anchor import named_generator
from .errors import RecipeError, StudyError, did_you_mean
from .evaluation import SteadyBatches, Task, top1
from .evaluation.calibration import (
    accuracy,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    tempered,
)
from .evaluation.task import Split
from .loading import ModelBuilder
from .merging import PreparedModel
from .notation import StateDict, Tensors
from .opening import open_run, require_same_inputs, targets
from .progress import Progress, silent
from .recipe import Recipe
from .records import Calibration, CalibrationRow, Hyperparameters, StudyResult
from .run import Run
from .search.database import StudyDatabase
from .tuning import load_result, study_file, write_text

GRID = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
"""log10 of the noise's size over the task vector's, where the search for sigma begins."""

REFINEMENTS = 6
"""Further values of sigma at most, between the neighbours of the best one."""

LogProbabilities = dict[str, Tensor]
"""By task: (n, classes), float64."""


def calibrate(
    study: str | Path,
    *,
    samples: int = 10,
    seed: int | None = None,
    out: str | Path | None = None,
    tasks: Sequence[Task] | str | None = None,
    model: ModelBuilder | str | None = None,
    progress: Progress = silent,
    **keys: Any,
) -> Calibration:
    """Sample the posterior around the best merge of a finished study, and measure how well calibrated it is.

    Accuracy, negative log-likelihood and expected calibration error (15 bins) of four models, on validation and test
    data: the "mean" of the posterior, which is the tuned merge; the "ensemble", the mean softmax of ``samples`` draws;
    the mean with one "temperature" a task, fitted on validation data (arXiv 1706.04599); the "experts". One model at a
    time is in memory.

    Args:
        study: the folder that `bmm.tune` wrote.
        samples: draws in the ensemble. The k-th draw is the same noise for every sigma, and depends on nothing but
            ``seed`` and k.
        seed: of the draws; the study's own by default.
        out: a JSON file for the result.
        tasks, model: as for `bmm.tune`, where the study was run on live objects.
        keys: ``device``, ``autocast`` and ``cache`` in place of the study's.

    Raises:
        StudyError: no finished study, or checkpoints that changed since.
        RecipeError: a task without labels, with a score of its own, or whose forward gives no logits.
        CheckpointError, GramError, MergeError: what is wrong with the input.
    """
    if samples < 1:
        raise RecipeError(f"{samples} samples", "draw at least one")
    if seed is not None and seed < 0:
        raise RecipeError(f"seed {seed} is negative", "take a whole number from 0 up")
    if out is not None and (Path(out).is_dir() or not Path(out).absolute().parent.is_dir()):
        raise RecipeError(f"cannot write {out}", "name a JSON file in a folder that exists")
    result, run = _open(study, tasks, model, progress, keys)
    judges = [Judge(run, split) for split in (("validation", "test") if run.has_test else ("validation",))]
    point = result.hyperparameters
    prepared = run.prepare().fixed(point)
    sampler = Sampler(run, prepared, point, samples, run.recipe.seed if seed is None else seed)
    mean = judges[0].log_probabilities(sampler.mean)
    sigma, search = choose_sigma(
        lambda s: judges[0].nll(sampler.ensemble(s, judges[0])), sampler.unit, judges[0].nll(mean), progress
    )
    temperatures = {name: fit_temperature(mean[name], labels) for name, labels in judges[0].labels.items()}
    rows: list[CalibrationRow] = []
    for done, judge in enumerate(judges):
        mean = mean if done == 0 else judge.log_probabilities(sampler.mean)
        models = {
            "mean": mean,
            "ensemble": sampler.ensemble(sigma, judge) if sigma else mean,
            "temperature": {name: tempered(p, temperatures[name]) for name, p in mean.items()},
            "experts": judge.experts(),
        }
        rows += [row for name, found in models.items() for row in judge.rows(name, found)]
        progress("score", done + 1, len(judges), judge.split)
    found = Calibration(
        str(Path(study)), result.best.number, samples, sampler.seed, sigma, sigma / sampler.unit if sigma else 0.0,
        temperatures, search, rows,
    )  # fmt: skip
    if out is not None:
        write_text(Path(out), json.dumps(found.to_json(), indent=1) + "\n")
    return found


def _open(
    study: str | Path, tasks: Any, model: Any, progress: Progress, keys: dict[str, Any]
) -> tuple[StudyResult, Run]:
    """The finished study, and the run it was, with every task judged by its labels."""
    allowed = ("device", "autocast", "cache")
    if unknown := sorted(set(keys) - set(allowed)):
        raise RecipeError(f"{unknown[0]} cannot change when a study is calibrated", did_you_mean(unknown[0], allowed))
    path = study_file(study)
    result = load_result(path.parent)
    if "result" not in result.paths:
        raise StudyError(f"the study in {path.parent} is not finished", f"`bmm tune --resume {path.parent}` goes on")
    again = keys | targets(tasks, model) | {"score_by": "labels", "out": str(path.parent)}
    run = open_run(Recipe.from_dict(result.recipe | again), tasks, model, progress)
    with StudyDatabase.open(path, readonly=True) as database:
        require_same_inputs(database, run.pool.fingerprint())
    return result, run


class Judge:
    """One split of every task: its labels, and any model's log probabilities on its inputs.

    Raises `RecipeError` for a task that has no class labels there or a score of its own, before any model runs.
    """

    def __init__(self, run: Run, split: Split) -> None:
        self.run, self.split = run, split
        self.batches = {task.name: SteadyBatches(task, split) for task in run.tasks}
        self.labels = {task.name: self._labels(task) for task in run.tasks}

    def _labels(self, task: Task) -> Tensor:
        if task.score is not top1:
            raise RecipeError(
                f"task {task.name!r} has a score of its own: what its outputs say about probabilities is not known",
                "calibrate tasks that are scored by the class of the largest logit (Task without score)",
            )
        for _ in task.batches(self.split):  # says so where there are no labels
            break
        targets = [torch.as_tensor(y) for _, y in self.batches[task.name] if y is not None]
        if any(y.dim() != 1 or y.is_floating_point() for y in targets):
            raise RecipeError(
                f"the {self.split} targets of task {task.name!r} are no class labels", "give whole numbers (n,)"
            )
        return torch.cat(targets).long().cpu()

    def log_probabilities(
        self, tensors: Tensors, tasks: Sequence[Task] | None = None, finite: bool = True
    ) -> LogProbabilities:
        """Of one model on the split, for every task or the given ones; ``finite``: refuse NaN and Inf."""
        found = {}
        for task in self.run.tasks if tasks is None else tasks:
            logits = torch.cat(self.run.outputs(tensors, task, self.batches[task.name], finite))  # (n, classes)
            labels = self.labels[task.name]
            if logits.dim() != 2 or len(logits) != len(labels):
                raise RecipeError(
                    f"task {task.name!r}: outputs of shape {tuple(logits.shape)} for {len(labels)} labels",
                    "forward must return logits (n, classes)",
                )
            if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
                raise RecipeError(
                    f"task {task.name!r} has labels {int(labels.min())} to {int(labels.max())}, "
                    f"its forward logits of {logits.shape[1]} classes",
                    "labels are 0 to classes - 1",
                )
            found[task.name] = logits.double().log_softmax(-1)
        return found

    def experts(self) -> LogProbabilities:
        """Of every task's own expert."""
        pairs = zip(self.run.tasks, self.run.pool.experts, strict=True)
        return {name: p for task, expert in pairs for name, p in self.log_probabilities(expert, [task]).items()}

    def nll(self, found: LogProbabilities) -> float:
        """The mean over tasks of the negative log-likelihood."""
        return math.fsum(negative_log_likelihood(found[t], y) for t, y in self.labels.items()) / len(self.labels)

    def rows(self, model: str, found: LogProbabilities) -> list[CalibrationRow]:
        """Every task's numbers for one model."""
        measures = (accuracy, negative_log_likelihood, expected_calibration_error)
        return [
            CalibrationRow(
                model, self.split, name, len(labels), *(measure(found[name], labels) for measure in measures)
            )
            for name, labels in self.labels.items()
        ]


class Sampler:
    """Draws from the posterior at one point, one model in memory at a time.

    ``unit`` is the sigma at which the first draw's noise is as large as the task vector of the mean (Frobenius norms
    over all solved modules): a scale that does not depend on the size of the weights. 0 where there is no noise or no
    task vector: the anchor itself (lam = inf) is a posterior without spread.
    """

    def __init__(self, run: Run, prepared: PreparedModel, point: Hyperparameters, samples: int, seed: int) -> None:
        self.prepared, self.point, self.samples, self.seed = prepared, point, samples, seed
        self.mean = prepared.merge(point)
        noise = _distance(self.draw(1.0, 0), self.mean)
        update = _distance(self.mean, {n: run.pool.base[n] for n in run.pool.float_names})
        self.unit = update / noise if noise > 0 else 0.0

    def draw(self, sigma: float, number: int) -> StateDict:
        """The posterior's draw of that number with noise ``sigma``."""
        return self.prepared.sample(self.point, sigma, named_generator("posterior", self.seed, number))

    def ensemble(self, sigma: float, judge: Judge) -> LogProbabilities:
        """Log of the mean softmax of the draws; NaN where a draw's noise is past the range of numbers."""
        total: LogProbabilities = {}
        for number in range(self.samples):
            for name, found in judge.log_probabilities(self.draw(sigma, number), finite=False).items():
                total[name] = torch.logaddexp(total[name], found) if number else found
        return {name: sums - math.log(self.samples) for name, sums in total.items()}


def choose_sigma(
    nll: Callable[[float], float], unit: float, at_zero: float, progress: Progress = silent
) -> tuple[float, list[tuple[float, float]]]:
    """The sigma with the least ``nll``, and all (sigma, nll) tried where that is finite, by sigma.

    Goes up `GRID` (in units of ``unit``) until the NLL is twice ``at_zero``, the NLL without noise: more noise only
    destroys more. A bounded minimiser (Brent) refines log sigma between the neighbours of the best value. Where nothing
    tried is below ``at_zero``, and where ``unit`` is 0, sigma is 0.
    """
    from scipy.optimize import minimize_scalar

    tried = {0.0: at_zero}
    most = len(GRID) + REFINEMENTS

    def loss(log_ratio: float) -> float:
        sigma = unit * 10.0**log_ratio
        if sigma not in tried:
            tried[sigma] = value if math.isfinite(value := nll(sigma)) else math.inf
            progress("sigma", min(len(tried) - 1, most - 1), most, f"sigma {sigma:.3g}, NLL {tried[sigma]:.4f}")
        return tried[sigma]

    if unit > 0:
        values: list[float] = []
        for step in GRID:
            values.append(loss(step))
            if values[-1] > 2 * at_zero:
                break
        best = min(range(len(values)), key=values.__getitem__)
        if values[best] < at_zero:
            low, high = (GRID[k] for k in (max(best - 1, 0), min(best + 1, len(GRID) - 1)))
            minimize_scalar(loss, bounds=(low, high), method="bounded", options={"maxiter": REFINEMENTS, "xatol": 0.05})
        progress("sigma", most, most)
    found = sorted((sigma, value) for sigma, value in tried.items() if math.isfinite(value))
    return min(found, key=lambda pair: pair[::-1])[0], found


def _distance(first: Tensors, second: Tensors) -> float:
    """Frobenius norm of the difference over the tensors of ``second`` that are floating."""
    squares = (
        float((first[n].double() - second[n].to(first[n].device).double()).square().sum())
        for n in second
        if second[n].is_floating_point()
    )
    return math.sqrt(math.fsum(squares))
