"""The accuracy table: every anchor plain, at its best scale, and under BMM with data and data-free Grams.

    python benchmarks/vit8.py                       the whole table (about 40 minutes on two cores)
    python benchmarks/vit8.py --quick               TSV alone, one seed, 12 trials
    python benchmarks/vit8.py --zoo vit20 --anchors tsv iso_c --seeds 1

Scales are picked on validation data; test data are scored once a finished model. Every cell is a study in --work and
is not run again while it is there. Errors are binomial standard errors of the mean over tasks; for several seeds the
mean over seeds is shown and the spread (standard deviation) over seeds is given beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch

import bmm
from bmm.recipe import Recipe
from bmm.report import gap_error, markdown, mean_and_error, percent
from bmm.run import Run
from bmm.tuning import load_result

SCALES = [round(0.1 * k, 1) for k in range(1, 21)]


def mean(scores: list[bmm.Score]) -> float:
    return mean_and_error(scores)[0]


def plain(run: Run, name: str, cache: Path) -> dict[str, float]:
    """Test accuracy of an anchor as published and at the scale of its task vector that is best on validation."""
    path = cache / f"plain-{run.recipe.zoo}-{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    grams = run.collect_grams() if "grams" in bmm.anchors.get(name).needs else None
    start = time.perf_counter()
    anchor = run.anchor(name, {}, grams)
    seconds = time.perf_counter() - start
    base = {n: run.pool.base[n].float() for n in run.pool.names}

    def scaled(s: float) -> dict[str, torch.Tensor]:
        return {n: base[n] + s * (anchor[n] - base[n]) for n in base}

    best = max(SCALES, key=lambda s: mean(run.score(scaled(s), "validation")))
    test, error = mean_and_error(run.score(anchor, "test"))
    tuned = mean(run.score(scaled(best), "test"))
    row = {"test": test, "error": error, "scale": best, "scaled": tuned, "seconds": seconds}
    path.write_text(json.dumps(row))
    return row


def tuned(args: argparse.Namespace, anchor: str, source: str, seed: int) -> bmm.StudyResult:
    out = args.work / f"{args.zoo}-{anchor}-{source}-b{args.budget}-s{seed}"
    if (out / "result.json").exists():
        return load_result(out)
    if (out / "study.db").exists():
        return bmm.tune(resume=out)
    return bmm.tune(
        zoo=args.zoo, anchor=anchor, grams=source, budget=args.budget, seed=seed, calibration=args.calibration,
        groups=args.groups, out=str(out),
    )  # fmt: skip


def cell(results: list[bmm.StudyResult]) -> tuple[str, str]:
    values = [r.mean("best") for r in results]
    error = mean_and_error(results[0].test["best"])[1]
    shares = [r.gap_closed() for r in results]
    spread = f" (sd {100 * statistics.stdev(values):.1f})" if len(values) > 1 else ""
    closed = statistics.mean(shares)
    text = "-" if math.isnan(closed) else f"{100 * closed:.0f} ± {100 * gap_error(results[0], 'test'):.0f} %"
    return percent(statistics.mean(values), error) + spread, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", default="vit8")
    parser.add_argument("--anchors", nargs="*", default=list(bmm.anchors.ANCHORS))
    parser.add_argument("--sources", nargs="*", default=["data", "datafree"])
    parser.add_argument("--headline", nargs="*", default=["tsv"], help="anchors that get all seeds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=50)
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--groups", default="depth")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("runs/bench"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.anchors, args.sources, args.seeds, args.budget = ["tsv"], ["data"], 1, min(args.budget, 12)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    run = Run(Recipe.from_dict({"zoo": args.zoo}))
    base = run.score({n: run.pool.base[n] for n in run.pool.names}, "test")
    experts = run.score_experts("test")
    rows = [["base", percent(*mean_and_error(base)), *[""] * (2 + 2 * len(args.sources))]]
    timing: list[tuple[float, float]] = []
    for anchor in args.anchors:
        row = plain(run, anchor, args.work)
        cells = [anchor, percent(row["test"], row["error"]), f"{row['scale']:.1f}", percent(row["scaled"])]
        for source in args.sources:
            seeds = range(args.seeds if anchor in args.headline else 1)
            results = [tuned(args, anchor, source, seed) for seed in seeds]
            cells += cell(results)
            for r in results:
                assert r.mean("best", "validation") >= 0
                assert r.best.objective is not None
                assert r.best.objective >= (r.trials[0].objective or 0), "below its anchor on validation"
                suggest = statistics.median(t.suggest_seconds for t in r.trials[2:]) if len(r.trials) > 2 else 0
                timing.append((suggest, statistics.median(t.seconds for t in r.trials)))
            print(" | ".join(cells), flush=True)
        rows.append(cells)
    rows.append(["experts", percent(*mean_and_error(experts)), *[""] * (2 + 2 * len(args.sources))])
    header = ["anchor", "plain", "scale", "at scale"]
    for source in args.sources:
        header += [f"BMM {source}", "gap closed"]
    print(f"\n{args.zoo}, test accuracy (%), {len(experts)} tasks, {sum(s.n for s in experts)} images; "
          f"{args.budget} trials, {args.calibration} calibration inputs a task, groups {args.groups}\n")  # fmt: skip
    print(markdown(header, rows))
    if timing:
        suggest, evaluate = (statistics.median(t[k] for t in timing) for k in (0, 1))
        print(f"\nmedian seconds a trial: suggestion {suggest:.2f}, evaluation {evaluate:.2f} ({args.threads} threads)")


if __name__ == "__main__":
    main()
