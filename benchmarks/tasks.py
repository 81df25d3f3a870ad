"""How much of the gap is closed as more tasks are merged: 2, 4, 8, 14 and 20 of the vit20 zoo, drawn at random.

    python benchmarks/tasks.py                     about 40 minutes on two cores
    python benchmarks/tasks.py --print             the table and the picture of the cells that are there

Each count is run on as many random sets of tasks as there are seeds (20 is one set, searched with each seed). Cells are
files in --work, as in zoo.py; the curve is written to --svg.
"""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from typing import Any

import torch
from zoo import Bench, closed, mean, options, publish, scores

from bmm import zoo
from bmm.report import markdown

ANCHOR = "tsv"
SOURCES = ("data", "datafree", "hybrid")
LINES = ("base", "task_arithmetic", ANCHOR, *(f"BMM {source}" for source in SOURCES), "experts")


def measure(args: Any, count: int, seed: int) -> dict[str, float] | None:
    """Mean test accuracy of every line, and the gap closed, for one random set of ``count`` tasks."""
    every = list(zoo.find(args.zoo).experts)
    names = sorted(random.Random(f"{count}-{seed}").sample(every, count)) if count < len(every) else every
    bench = Bench(args, names, "" if count == len(every) else f"-{count}of{seed}")
    ends, plains = bench.ends(), {a: bench.plain(a) for a in ("task_arithmetic", ANCHOR)}
    tuned = {s: bench.tuned(f"{ANCHOR}-{s}", seed, anchor=ANCHOR, grams=s) for s in SOURCES}
    if ends is None or None in plains.values() or None in tuned.values():
        return None
    anchor, experts = scores(plains[ANCHOR]["test"]), scores(ends["experts"])
    found = {"base": mean(scores(ends["base"])), "experts": mean(experts)}
    found |= {a: mean(scores(row["test"])) for a, row in plains.items()}
    for source, row in tuned.items():
        best = scores(row["test"])
        found[f"BMM {source}"] = mean(best)
        found[f"gap {source}"], found[f"error {source}"] = closed(best, anchor, experts)
    return found


def draw(path: Path, points: dict[int, list[dict[str, float]]]) -> None:
    """Two panels over the number of tasks: accuracy, and share of the gap closed with its spread over sets."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "bmm"
    from matplotlib import pyplot

    counts = sorted(points)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for line in LINES:
        left.plot(counts, [100 * statistics.mean(p[line] for p in points[c]) for c in counts], marker="o", label=line)
    for source in SOURCES:
        shares = [[100 * p[f"gap {source}"] for p in points[c]] for c in counts]
        spread = [statistics.stdev(s) if len(s) > 1 else 0.0 for s in shares]
        right.errorbar(
            counts, [statistics.mean(s) for s in shares], spread, marker="o", capsize=3, label=f"BMM {source}"
        )
    left.set(xlabel="tasks merged", ylabel="mean test accuracy (%)", xticks=counts)
    right.set(xlabel="tasks merged", ylabel="gap closed (%)", xticks=counts)
    right.axhline(0, color="grey", linewidth=0.8)
    for axis in (left, right):
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = options(__doc__.splitlines()[0], "vit20")
    parser.add_argument("--counts", type=int, nargs="*", default=[2, 4, 8, 14, 20])
    parser.add_argument("--svg", type=Path, default=Path("docs/pictures/tasks.svg"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    points: dict[int, list[dict[str, float]]] = {}
    for count in args.counts:
        measured = [measure(args, count, seed) for seed in range(args.seeds)]
        points[count] = [m for m in measured if m is not None]
    rows = []
    for count, found in points.items():
        if found:
            shares = [[100 * p[f"gap {s}"] for p in found] for s in SOURCES]
            means = [f"{100 * statistics.mean(p[line] for p in found):.1f}" for line in LINES]
            spreads = [f" (sd {statistics.stdev(s):.0f})" if len(s) > 1 else "" for s in shares]
            gaps = [f"{statistics.mean(s):.0f}{spread} %" for s, spread in zip(shares, spreads, strict=True)]
            rows.append([str(count), str(len(found)), *means, *gaps])
    publish(args, "tasks", markdown(["tasks", "sets", *LINES, *(f"gap closed, {s}" for s in SOURCES)], rows))
    if rows:
        args.svg.parent.mkdir(parents=True, exist_ok=True)
        draw(args.svg, {c: p for c, p in points.items() if p})


if __name__ == "__main__":
    main()
