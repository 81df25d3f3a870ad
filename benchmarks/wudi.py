"""WUDI solved exactly against the published 300 Adam steps: seconds, objective, test accuracy.

    python benchmarks/wudi.py            the embedded zoo's eight experts
    python benchmarks/wudi.py --quick    one timing round, no accuracy

Seconds are those of every matrix of the model, in turn in one process, medians over rounds. The objective is the sum
over matrices of the tasks' interference (arXiv 2503.08099) at scale 1, relative to that of the sum of the task vectors,
where Adam starts. Test data are scored once a finished model, at the published scale of 1.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from bmm.anchors import merge_stream
from bmm.anchors.anchor import matrix_shape
from bmm.anchors.wudi import objective
from bmm.recipe import Recipe
from bmm.report import markdown, mean_and_error, percent
from bmm.run import Run

START = "start: sum of task vectors"
METHODS: dict[str, tuple[str, dict[str, float | int | str]]] = {
    START: ("task_arithmetic", {"scale": 1.0}),
    "wudi, 300 Adam steps": ("wudi", {}),
    "wudi, 3000 Adam steps": ("wudi", {"steps": 3000}),
    "wudi_exact, ridge 1e-6": ("wudi_exact", {"ridge": 1e-6}),
    "wudi_exact, ridge 1e-3": ("wudi_exact", {"ridge": 1e-3}),
    "wudi_exact, ridge 1e-2": ("wudi_exact", {"ridge": 1e-2}),
    "wudi_exact, ridge 1e-1": ("wudi_exact", {"ridge": 1e-1}),
    "wudi_exact, ridge 1e-2, towards mean": ("wudi_exact", {"ridge": 1e-2, "towards": "mean"}),
}


def merged(run: Run, label: str) -> tuple[dict[str, Tensor], float]:
    """The model, and the seconds it took."""
    name, knobs = METHODS[label]
    start = time.perf_counter()
    model = dict(merge_stream(name, run.pool.base, run.pool.experts, dtype=torch.float32, **knobs))
    return model, time.perf_counter() - start


def interference(run: Run, model: dict[str, Tensor]) -> float:
    """The objective over all matrices."""
    total = 0.0
    for name in run.pool.float_names:
        shape = matrix_shape(run.pool.shape(name))
        if shape is not None:
            taus = run.pool.task_vectors(name, torch.float64).reshape(-1, *shape)  # (T, o, i)
            d = (model[name].double() - run.pool.base[name].double()).reshape(shape)
            total += objective(d, taus)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", default="vit8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    labels = [label for label in METHODS if not (args.quick and "3000" in label)]
    run = Run(Recipe.from_dict({"zoo": args.zoo}))
    models: dict[str, dict[str, Tensor]] = {}
    seconds: dict[str, list[float]] = {label: [] for label in labels}
    for _ in range(1 if args.quick else args.rounds):
        for label in labels:
            models[label], took = merged(run, label)
            seconds[label].append(took)
    begin = interference(run, models[START])
    rows = []
    for label in labels:
        row = [label, f"{statistics.median(seconds[label]):.2f}", f"{interference(run, models[label]) / begin:.6f}"]
        rows.append([*row, "-" if args.quick else percent(*mean_and_error(run.score(models[label], "test")))])
    print(markdown(["method", "seconds", "objective / start", "test accuracy"], rows))
    print(f"\n{args.zoo}, {len(run.pool)} experts, {args.threads} thread(s), medians of interleaved rounds")


if __name__ == "__main__":
    main()
