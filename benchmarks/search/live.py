"""Engines on the real thing: whole studies, and what their winners score on test data.

    python benchmarks/search/live.py                    vit8, TSV anchor, hybrid Grams, a pair a role, three seeds
    python benchmarks/search/live.py --print --into docs/search.md

Model-based engines get 50 trials, CMA-ES and TPE 200. Test data are scored once a finished study. Cells are files in
--work, as in zoo.py, and are not run again.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from zoo import Bench, begun, cells, options, publish, scores

from bmm.report import markdown

BUDGETS = {"botorch": (50,), "ax": (50,), "cma": (200,), "tpe": (200,)}


def with_budget(bench: Bench, budget: int) -> Bench:
    """The same bench for studies of another length."""
    other = copy.copy(bench)
    other.args = argparse.Namespace(**{**vars(bench.args), "budget": budget})
    return other


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--groups", default="role")
    parser.add_argument("--engines", nargs="*", default=list(BUDGETS), choices=BUDGETS)
    bench, ends, plain = begun(parser)
    args = bench.args
    keys: dict[str, Any] = {"anchor": args.anchor, "grams": "hybrid", "groups": args.groups, "calibration": 64}
    lines = []
    for engine in args.engines:
        for budget in BUDGETS[engine]:
            one = with_budget(bench, budget)
            label = f"{args.anchor}-hybrid-{args.groups}-{engine}"
            found = [f for s in range(args.seeds) if (f := one.tuned(label, s, engine=engine, **keys))]
            if not found:
                continue
            best = [f["objective"] for f in found]
            spread = f" (sd {statistics.stdev(best):.4f})" if len(best) > 1 else ""
            accuracy = cells(found, scores(plain["test"]), scores(ends["experts"]))
            seconds = [f"{statistics.median(f[k] for f in found):.2f}" for k in ("suggest", "evaluate")]
            objective = f"{statistics.mean(best):.4f}{spread}"
            lines.append([engine, str(budget), str(len(found)), objective, *accuracy, *seconds])
    header = ["engine", "trials", "seeds", "validation objective", "test accuracy (%)", "gap closed"]
    header += ["suggest s", "evaluate s"]
    publish(args, "live", f"{args.zoo}, anchor {args.anchor}, groups {args.groups}\n\n{markdown(header, lines)}")


if __name__ == "__main__":
    main()
