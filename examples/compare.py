"""A table of base, experts, plain merges and BMM on the tasks of a recipe; both text examples make theirs with it.

Hyperparameters are picked on validation data; test data are scored once a finished model. Every row is a file in the
work folder and is not computed again while it is there, so a stopped comparison goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import bmm
from benchmarks.zoo import fitting, publish, rows, scores
from bmm.checkpoint import open_checkpoint
from bmm.opening import open_run
from bmm.progress import silent
from bmm.report import markdown, mean_and_error, percent

SOURCES = ("data", "datafree", "hybrid")


def options(description: str, work: str, anchors: Sequence[str]) -> argparse.ArgumentParser:
    """The flags both examples have; ``anchors``: what is tuned unless said."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--anchors", nargs="*", help="plain merges (default: all that take this many experts)")
    parser.add_argument("--tuned", nargs="*", default=list(anchors), help="anchors that BMM is tuned on")
    parser.add_argument("--sources", nargs="*", default=list(SOURCES), choices=SOURCES, help="Grams of BMM")
    parser.add_argument("--budget", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path(work))
    parser.add_argument("--into", type=Path, help="a Markdown file whose marked place takes the table")
    return parser


class Comparison:
    """The models of one recipe, each scored on the test data of every task."""

    def __init__(self, keys: dict[str, Any], args: argparse.Namespace, tasks: Sequence[bmm.Task] | None = None) -> None:
        self.keys, self.args = keys | {"calibration": args.calibration}, args
        self.run = open_run(bmm.make_recipe(self.keys), tasks, None, silent)
        self.blind = [replace(task, test=None) for task in self.run.tasks]
        self.grams: Any = None
        torch.set_num_threads(args.threads)
        args.work.mkdir(parents=True, exist_ok=True)

    def cell(self, name: str, compute: Callable[[], list[bmm.Score]]) -> list[bmm.Score]:
        path = self.args.work / f"{name}.json"
        if not path.exists():
            start = time.perf_counter()
            found = rows(compute())
            path.write_text(json.dumps({"test": found, "seconds": time.perf_counter() - start}))
        return scores(json.loads(path.read_text())["test"])

    def base(self) -> list[bmm.Score]:
        return self.run.score({n: self.run.pool.base[n] for n in self.run.pool.names}, "test")

    def plain(self, anchor: str) -> list[bmm.Score]:
        """The method as published, with its default knobs."""
        if "grams" in bmm.anchors.get(anchor).needs and self.grams is None:
            self.grams = self.run.collect_grams()
        return self.run.score(self.run.anchor(anchor, {}, self.grams), "test")

    def tuned(self, anchor: str, source: str, out: Path) -> list[bmm.Score]:
        """The best trial of a study over that anchor; a study that was stopped goes on."""
        if (out / "study.db").exists():
            bmm.tune(resume=out, tasks=self.blind)
        else:
            chosen = {"anchor": anchor, "grams": source, "budget": self.args.budget, "seed": self.args.seed}
            bmm.tune(**self.keys | chosen | {"out": str(out), "tasks": self.blind})
        return self.run.score(open_checkpoint(out / "model"), "test")

    def models(self) -> dict[str, list[bmm.Score]]:
        """Test scores by row of the table."""
        found = {"base": self.cell("base", self.base)}
        experts = self.cell("experts", lambda: self.run.score_experts("test"))
        for anchor in self.args.anchors if self.args.anchors is not None else fitting(len(experts)):
            found[anchor] = self.cell(f"plain-{anchor}", lambda a=anchor: self.plain(a))
            print(anchor, percent(*mean_and_error(found[anchor])), flush=True)
        for anchor in self.args.tuned:
            for source in self.args.sources:
                label = f"{anchor}-{source}-b{self.args.budget}-s{self.args.seed}"
                row = f"{anchor}, BMM {source}"
                found[row] = self.cell(label, lambda a=anchor, s=source, n=label: self.tuned(a, s, self.args.work / n))
                print(row, percent(*mean_and_error(found[row])), flush=True)
        return found | {"experts": experts}

    def table(self, means: bool = True) -> str:
        """One row a model and one column a task, in percent; ``means``: and their mean with its standard error."""
        header = ["model", *[task.name for task in self.run.tasks], *(["mean"] if means else [])]
        lines = []
        for name, found in self.models().items():
            line = [name, *[percent(s.value) for s in found]]
            lines.append(line + ([percent(*mean_and_error(found))] if means else []))
        return markdown(header, lines)


def main(comparison: Comparison, name: str, head: str, means: bool = True) -> None:
    publish(comparison.args, name, f"{head}\n\n{comparison.table(means)}")
