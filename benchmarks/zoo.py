"""The accuracy table: every anchor plain, at its best scale, and under BMM with data, data-free and hybrid Grams.

    python benchmarks/zoo.py                          vit8, the whole table (50 minutes on one core)
    python benchmarks/zoo.py --zoo vit20              twenty tasks (two hours on one core)
    python benchmarks/zoo.py --quick                  TSV alone, data Grams, one seed, 12 trials
    python benchmarks/zoo.py --print                  the table of the cells that are there

Scales and hyperparameters are picked on validation data; the search never sees test data, which are scored once a
finished model. Every cell is a file in --work and is not run again while it is there, so a stopped run goes on where it
was, and two processes can share the work by --anchors. Errors are binomial standard errors of the mean over tasks; for
several seeds the mean is shown, with the standard deviation over seeds beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import bmm
from bmm import zoo
from bmm.checkpoint import open_checkpoint
from bmm.recipe import Recipe
from bmm.records import Score
from bmm.report import gap_error, markdown, mean_and_error, percent
from bmm.run import Run
from bmm.tuning import load_result

SCALES = [round(0.1 * k, 1) for k in range(1, 21)]
SOURCES = ("data", "datafree", "hybrid")


def mean(scores: list[Score]) -> float:
    return mean_and_error(scores)[0]


class Bench:
    """One zoo (or some of its tasks), opened once; cells are computed where their file is missing."""

    def __init__(self, args: argparse.Namespace, names: Sequence[str] = (), tag: str = "") -> None:
        self.args, self.label = args, args.zoo + tag
        opened = zoo.find(args.zoo)
        experts = {k: str(v) for k, v in opened.experts.items() if not names or k in names}
        self.keys = {"base": str(opened.base), "experts": experts, "autocast": args.autocast}
        tasks = [task for task in opened.tasks() if task.name in experts]
        self.run = Run(Recipe.from_dict(self.keys), tasks=tasks, model=zoo.model)
        self.blind = [replace(task, test=None) for task in tasks]
        self.grams: Any = None
        args.work.mkdir(parents=True, exist_ok=True)

    def cell(self, name: str, compute: Any) -> dict[str, Any] | None:
        """The stored result of that name, or a new one; None with --print where there is none."""
        path = self.args.work / f"{self.label}-{name}.json"
        if not path.exists():
            if self.args.print:
                return None
            found = compute()
            path.write_text(json.dumps(found))
        return dict(json.loads(path.read_text()))

    def ends(self) -> dict[str, Any] | None:
        """Test scores of base and experts."""

        def compute() -> dict[str, Any]:
            base = {n: self.run.pool.base[n] for n in self.run.pool.names}
            return {"base": rows(self.run.score(base, "test")), "experts": rows(self.run.score_experts("test"))}

        return self.cell("ends", compute)

    def plain(self, name: str) -> dict[str, Any] | None:
        """Test scores of a method as published and at the scale of its task vector that is best on validation."""

        def compute() -> dict[str, Any]:
            run = self.run
            if "grams" in bmm.anchors.get(name).needs and self.grams is None:
                self.grams = run.collect_grams()
            start = time.perf_counter()
            anchor = run.anchor(name, {}, self.grams)
            seconds = time.perf_counter() - start
            base = {n: run.pool.base[n].float() for n in run.pool.names}

            def scaled(s: float) -> dict[str, torch.Tensor]:
                return {n: base[n] + s * (anchor[n] - base[n]) for n in base}

            best = max(SCALES, key=lambda s: mean(run.score(scaled(s), "validation")))
            test = rows(run.score(anchor, "test"))
            return {"test": test, "scale": best, "scaled": rows(run.score(scaled(best), "test")), "seconds": seconds}

        return self.cell(f"plain-{name}", compute)

    def tuned(self, label: str, seed: int, **keys: Any) -> dict[str, Any] | None:
        """A study; test scores of its best trial."""
        args = self.args
        name = f"{label}-b{args.budget}-s{seed}"

        def compute() -> dict[str, Any]:
            out = args.work / f"{self.label}-{name}"
            given: dict[str, Any] = {"tasks": self.blind, "model": zoo.model}
            if (out / "result.json").exists():
                result = load_result(out)
            elif (out / "study.db").exists():
                result = bmm.tune(resume=out, **given)
            else:
                result = bmm.tune(budget=args.budget, seed=seed, out=str(out), **self.keys, **given, **keys)
            model = open_checkpoint(out / "model")
            trials = result.trials
            return {
                "objective": result.best.objective,
                "anchor": trials[0].objective,
                "test": rows(self.run.score(model, "test")),
                "suggest": statistics.median(t.suggest_seconds for t in trials[2:]) if len(trials) > 2 else 0.0,
                "evaluate": statistics.median(t.seconds for t in trials),
            }

        return self.cell(name, compute)


def rows(scores: list[Score]) -> list[list[Any]]:
    return [[s.task, s.value, s.n] for s in scores]


def scores(found: list[list[Any]]) -> list[Score]:
    return [Score(*row) for row in found]


def closed(best: list[Score], anchor: list[Score], experts: list[Score]) -> tuple[float, float]:
    """Share of the gap between anchor and experts that is closed on test data, and its standard error."""
    trial = bmm.Trial(0, "anchor", "completed", bmm.Hyperparameters({}, {}))
    result = bmm.StudyResult(trial, [trial], {}, {"best": best, "anchor": anchor, "experts": experts}, {}, {})
    return result.gap_closed(), gap_error(result, "test")


def cells(found: list[dict[str, Any]], anchor: list[Score], experts: list[Score]) -> tuple[str, str]:
    """Accuracy and share of the gap over the seeds of one study."""
    tests = [scores(f["test"]) for f in found]
    values = [mean(t) for t in tests]
    spread = f" (sd {100 * statistics.stdev(values):.1f})" if len(values) > 1 else ""
    shares, errors = zip(*(closed(t, anchor, experts) for t in tests), strict=True)
    share = statistics.mean(shares)
    text = "-" if math.isnan(share) else f"{100 * share:.0f} ± {100 * errors[0]:.0f} %"
    return percent(statistics.mean(values), mean_and_error(tests[0])[1]) + spread, text


def fitting(experts: int) -> list[str]:
    """Methods that take that many experts."""
    return [a.name for a in bmm.anchors.ANCHORS.values() if (a.experts[1] or experts) >= experts >= a.experts[0]]


def table(bench: Bench) -> tuple[list[list[str]], list[tuple[float, float]]]:
    args, ends = bench.args, bench.ends()
    if ends is None:
        raise SystemExit("no cells yet; run without --print")
    base, experts = scores(ends["base"]), scores(ends["experts"])
    blank = [""] * (2 + 2 * len(args.sources))
    lines = [["base", percent(*mean_and_error(base)), *blank]]
    timing = []
    for anchor in args.anchors or fitting(len(experts)):
        row = bench.plain(anchor)
        if row is None:
            continue
        test = scores(row["test"])
        line = [anchor, percent(*mean_and_error(test)), f"{row['scale']:.1f}", percent(mean(scores(row["scaled"])))]
        for source in args.sources:
            seeds = range(args.seeds if anchor in args.headline else 1)
            keys = {"anchor": anchor, "grams": source, "groups": args.groups, "calibration": args.calibration}
            every = (bench.tuned(f"{anchor}-{source}", s, **keys) for s in seeds)
            found = [f for f in every if f is not None]
            line += cells(found, test, experts) if found else ("", "")
            assert all(f["objective"] >= f["anchor"] for f in found), "below its anchor on validation"
            timing += [(f["suggest"], f["evaluate"]) for f in found]
        if not args.print:
            print(" | ".join(line), flush=True)
        lines.append(line)
    lines.append(["experts", percent(*mean_and_error(experts)), *blank])
    return lines, timing


def options(description: str, zoo_name: str = "vit8") -> argparse.ArgumentParser:
    """Flags that all accuracy benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--zoo", default=zoo_name)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=50)
    parser.add_argument("--autocast", default="bfloat16", help="precision of all scores")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("runs/bench"))
    parser.add_argument("--print", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--into", type=Path, help="a Markdown file whose marked place takes the result")
    return parser


def begun(parser: argparse.ArgumentParser) -> tuple[Bench, dict[str, Any], dict[str, Any]]:
    """The bench of the command line, which gets a flag for the anchor, and the cells of base and experts and of the
    plain anchor; stops where there are none to print."""
    parser.add_argument("--anchor", default="tsv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    ends, plain = bench.ends(), bench.plain(args.anchor)
    if ends is None or plain is None:
        raise SystemExit("no cells yet; run without --print")
    return bench, ends, plain


def publish(args: argparse.Namespace, name: str, text: str) -> None:
    """Print a result; with --into FILE put it there, between the lines ``<!-- name -->`` and ``<!-- end name -->``."""
    print(f"\n{text}")
    if args.into:
        page = args.into.read_text()
        opening, closing = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        if opening not in page or closing not in page:
            raise SystemExit(f"{args.into} has no lines {opening.strip()} and {closing}")
        before, _, rest = page.partition(opening)
        args.into.write_text(f"{before}{opening}\n{text}\n\n{closing}{rest.partition(closing)[2]}")


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--anchors", nargs="*", help="default: all that take this many experts")
    parser.add_argument("--sources", nargs="*", default=list(SOURCES), choices=SOURCES)
    parser.add_argument("--headline", nargs="*", default=["tsv"], help="anchors that get all seeds")
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--groups", default="depth")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.anchors, args.sources, args.seeds, args.budget = ["tsv"], ["data"], 1, min(args.budget, 12)
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    lines, timing = table(bench)
    header = ["anchor", "plain", "scale", "at scale"]
    for source in args.sources:
        header += [f"BMM {source}", "gap closed"]
    images = sum(s.n for s in scores((bench.ends() or {})["experts"]))
    text = (
        f"{args.zoo}, test accuracy (%), {len(bench.run.tasks)} tasks, {images} images; {args.budget} trials,\n"
        f"{args.calibration} calibration inputs a task, groups {args.groups}, autocast {args.autocast}\n\n"
        + markdown(header, lines)
    )
    wanted = args.anchors or fitting(len(bench.run.tasks))
    if len(lines) - 2 < len(wanted):
        text += (
            f"\n\n{len(lines) - 2} of {len(wanted)} anchors have been run; the same command goes on with the others."
        )
    if timing:
        suggest, evaluate = (statistics.median(t[k] for t in timing) for k in (0, 1))
        text += f"\n\nmedian seconds a trial: suggestion {suggest:.2f}, evaluation {evaluate:.2f}"
    publish(args, f"zoo {args.zoo}", text)


if __name__ == "__main__":
    main()
