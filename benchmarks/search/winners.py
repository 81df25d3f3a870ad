"""What the winners of `race.py` are worth on test data: each is merged for real and scored once.

    python benchmarks/search/winners.py --into docs/search.md
    python benchmarks/search/winners.py --engines botorch cma --seeds 3
    python benchmarks/search/winners.py --print --into docs/search.md

A winner is the point with the best score of a race on a table; nothing is chosen by what is measured here. Scores are
kept beside the race's cells and are not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from studied import run_of
from zoo import publish

from bmm.records import Hyperparameters
from bmm.report import markdown
from bmm.tuning import search_space


@dataclass(frozen=True)
class Table:
    """The study a table was measured from (see `collect.py`)."""

    zoo: str
    settings: dict[str, Any]


TABLES = {
    "vit8-role": Table("vit8", {"groups": "role"}),
    "vit20-bands": Table("vit20", {"groups": "bands", "bands": 2}),
}


class Judge:
    """Merges points of a table's space and scores them on test data."""

    def __init__(self, name: str) -> None:
        table = TABLES[name]
        self.run = run_of(table.zoo, anchor="tsv", grams="hybrid", **table.settings)
        self.prepared = self.run.prepare()
        self.space = search_space(self.run, self.prepared.groups)
        with np.load(Path(__file__).parent / "tables" / f"{name}.npz") as measured:
            if (known := measured["parameters"].tolist()) != [p.name for p in self.space.parameters]:
                raise SystemExit(f"{name}: the table's parameters are {', '.join(known)}, the study's are others")

    def test(self, hyperparameters: Hyperparameters) -> list[float]:
        """Accuracy by task: (T,)."""
        return [s.value for s in self.run.score(self.prepared.merge(hyperparameters), "test")]


def rows_of(args: argparse.Namespace, name: str, judges: dict[str, Judge]) -> dict[str, np.ndarray]:
    """By engine and trials, the mean test accuracy of each seed's winner (and of the default): (seeds,)."""

    def judged(file: Path, unit: list[float] | None) -> float | None:
        """The stored or new mean accuracy at a unit point; of the default where there is none."""
        if not file.exists():
            if args.print:
                return None
            if name not in judges:
                judges[name] = Judge(name)
            space = judges[name].space
            at = space.default() if unit is None else space.to_hyperparameters(space.from_unit(np.array(unit)))
            file.write_text(json.dumps({"test": judges[name].test(at)}))
            print(file.name, flush=True)
        return float(np.mean(json.loads(file.read_text())["test"]))

    found: dict[str, list[float]] = {}
    if (default := judged(args.work / f"{name}-default.test.json", None)) is not None:
        found["default (no search)"] = [default]
    for engine in args.engines:
        for cell in sorted(args.work.glob(f"{name}-{engine}-b*-s*.json")):
            stem, _, seed = cell.stem.rpartition("-s")
            if cell.name.endswith(".test.json") or int(seed) >= args.seeds:
                continue
            value = judged(cell.with_suffix(".test.json"), json.loads(cell.read_text())["best"])
            if value is not None:
                found.setdefault(f"{engine}, {stem.rpartition('-b')[2]} trials", []).append(value)
    return {key: np.array(values) for key, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="*", default=list(TABLES), choices=TABLES)
    parser.add_argument("--engines", nargs="*", default=["botorch", "turbo", "ax", "saasbo", "cma", "tpe", "sobol"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/race"))
    parser.add_argument("--print", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--into", type=Path, help="a Markdown file whose marked place takes the result")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    judges: dict[str, Judge] = {}
    lines = []
    for name in args.tables:
        found = rows_of(args, name, judges)
        first = next((values for key, values in found.items() if key.startswith("botorch")), None)
        for key, values in found.items():
            shown = f"{100 * values.mean():.2f}"
            if len(values) > 1:
                shown += f" ± {100 * error(values):.2f}"
            against = ""
            if first is not None and values is not first and min(len(values), len(first)) > 1:
                spread = math.hypot(error(values), error(first))
                against = f"{100 * (first.mean() - values.mean()):+.2f} ± {100 * spread:.2f}"
            lines.append([name, key, str(len(values)), shown, against])
    header = ["table", "winner of", "seeds", "test accuracy (%)", "botorch better by"]
    publish(args, "winners", markdown(header, lines))


def error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1)) / math.sqrt(len(values))


if __name__ == "__main__":
    main()
