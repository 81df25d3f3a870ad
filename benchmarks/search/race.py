"""Which engine finds most: share of the reachable gain after 15 to 200 trials, on tables of real studies.

    python benchmarks/search/race.py                              every engine and table, 10 seeds
    python benchmarks/search/race.py --engines botorch cma --seeds 3
    python benchmarks/search/race.py --engines botorch botorch+refine --budget 25
    python benchmarks/search/race.py --print --into docs/search.md

Every engine sees the anchor and the default first, and those with a first design the same quasi-random points for the
same seed. ENGINE+refine goes through the stages of --refine, whose lengths depend on the budget. The share is (chosen -
default) / (optimum - default) of the smooth objective, where the chosen trial is the best one observed, so that luck
with noise does not count. Model-based engines stop after --budget trials, the others after --long. Finished runs are
files in --work and are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from problem import Problem
from zoo import publish

from bmm.report import markdown
from bmm.search.engine import Engine, build_engine
from bmm.search.goal import Goal
from bmm.search.refine import Refined, plan
from bmm.search.space import Space

CHEAP = ("cma", "tpe", "sobol")
"""Engines that are given --long trials: what they ask for is cheap."""
MARKS = (15, 25, 50, 100, 200)


def run(problem: Problem, engine: str, seed: int, budget: int) -> dict[str, Any]:
    """One study in memory: the smooth objective of the best trial so far after each trial."""
    space, started = problem.space, time.perf_counter()
    name, _, refined = engine.partition("+")

    def build(tied: Space) -> Engine:
        return build_engine(name, tied, seed)

    suggester = build(space)
    if refined:
        stages = plan(coarsenings(space.groups), space.groups, budget)
        suggester = Refined(space, stages, Goal.of(dict.fromkeys(problem.tasks, 1.0)), build)
    rows = [problem.trial(0, "anchor", space.anchor()), problem.trial(1, "default", space.default())]
    notices = 0
    while len(rows) < budget:
        suggestion = suggester.ask(rows)
        notices += bool(suggestion.notice)
        rows.append(problem.trial(len(rows), "search", space.to_hyperparameters(suggestion.point)))
    smooth = [float(problem.smooth(space.to_unit(space.point_of(r.hyperparameters))).mean()) for r in rows]
    best, chosen = 0, []
    for number, row in enumerate(rows):
        best = number if row.objective > rows[best].objective else best  # type: ignore[operator]
        chosen.append(smooth[best])
    return {
        "chosen": chosen,
        "seconds": time.perf_counter() - started,
        "notices": notices,
        "best": space.to_unit(space.point_of(rows[best].hyperparameters)).tolist(),
    }


def coarsenings(groups: list[str]) -> list[dict[str, str]]:
    """All groups in one, and, where they are roles within bands (``q.0``, ``q.1``), one a role."""
    roles = {group: group.partition(".")[0] for group in groups}
    return [dict.fromkeys(groups, "all"), *([roles] if len(set(roles.values())) < len(groups) else [])]


def cell(args: argparse.Namespace, path: Path, problems: dict[str, Problem], engine: str, seed: int) -> Any:
    """The stored or new result of one study; None with --print where there is none."""
    long = engine.partition("+")[0] in CHEAP
    budget = args.long if long else args.budget
    file = args.work / f"{path.stem}-{engine}-b{budget}-s{seed}.json"
    if not file.exists():
        if args.print:
            return None
        if path.stem not in problems:
            problems[path.stem] = Problem(path)
        file.write_text(json.dumps(run(problems[path.stem], engine, seed, budget)))
        print(file.name, flush=True)
    return json.loads(file.read_text())


def ends(args: argparse.Namespace, path: Path, problems: dict[str, Problem]) -> Mapping[str, float] | None:
    """The smooth objective at the default and at the optimum."""
    file = args.work / f"{path.stem}-ends.json"
    if not file.exists():
        if args.print:
            return None
        problem = problems.setdefault(path.stem, Problem(path))
        file.write_text(json.dumps({"default": problem.default(), "optimum": problem.optimum()}))
    found: Mapping[str, float] = json.loads(file.read_text())
    return found


def draw(path: Path, curves: dict[str, dict[str, np.ndarray]]) -> None:
    """Share of the gain over trials, one panel a table."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "bmm"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(curves), figsize=(4.6 * len(curves), 3.4), layout="constrained", squeeze=False
    )
    for axis, (name, engines) in zip(axes[0], curves.items(), strict=True):
        for engine, curve in engines.items():
            axis.plot(range(1, len(curve) + 1), curve, label=engine)
        axis.set(title=name, xlabel="trials", ylabel="share of the reachable gain", xscale="log", xlim=(5, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tables = sorted((Path(__file__).parent / "tables").glob("*.npz"))
    parser.add_argument("--tables", nargs="*", type=Path, default=tables)
    parser.add_argument("--engines", nargs="*", default=["botorch", "ax", "turbo", "cma", "tpe", "sobol"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget", type=int, default=50)
    parser.add_argument("--long", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/race"))
    parser.add_argument("--svg", type=Path, default=Path("docs/pictures/search.svg"))
    parser.add_argument("--print", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--into", type=Path, help="a Markdown file whose marked place takes the result")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    problems: dict[str, Problem] = {}
    lines, curves = [], {}
    for path in args.tables:
        bounds = ends(args, path, problems)
        if bounds is None:
            continue
        curves[path.stem] = {}
        for engine in args.engines:
            found = [c for s in range(args.seeds) if (c := cell(args, path, problems, engine, s)) is not None]
            if not found:
                continue
            gain = bounds["optimum"] - bounds["default"]
            shares = np.array([[(v - bounds["default"]) / gain for v in c["chosen"]] for c in found])  # (seeds, trials)
            curves[path.stem][engine] = shares.mean(0)
            marks = []
            for mark in MARKS:
                if mark > shares.shape[1]:
                    marks.append("")
                    continue
                column = shares[:, mark - 1]
                error = column.std(ddof=1) / math.sqrt(len(column)) if len(column) > 1 else math.nan
                marks.append(f"{column.mean():.2f} ± {error:.2f}")
            seconds = statistics.mean(c["seconds"] / len(c["chosen"]) for c in found)
            lines.append([path.stem, engine, str(len(found)), *marks, f"{seconds:.2f}"])
    header = ["table", "engine", "seeds", *(f"@{m}" for m in MARKS), "seconds a trial"]
    publish(args, "race", markdown(header, lines))
    if lines:
        draw(args.svg, curves)


if __name__ == "__main__":
    main()
