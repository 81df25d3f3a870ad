"""Stopping trials early, live: what it saves of the evaluation time, and what it costs on test data.

    python benchmarks/stopping.py --zoo vit20                TSV anchor, hybrid Grams, 50 trials, three seeds
    python benchmarks/stopping.py --zoo vit20 --print        the table of the cells that are there

"saved" is the share of evaluation time that a study with early stopping does without: its own seconds against those it
had taken had every trial cost what its completed ones did. Test data are scored once a finished study. Cells are files
in --work, as in zoo.py, whose cells of studies without stopping serve here too.
"""

from __future__ import annotations

import statistics
from typing import Any

from zoo import Bench, begun, cells, options, publish, scores

from bmm.report import markdown
from bmm.tuning import load_result

RISKS = (0.0, 0.05, 0.1)


def cost(bench: Bench, label: str, seed: int) -> dict[str, Any] | None:
    """Time and task scores that one study with early stopping saved."""

    def compute() -> dict[str, float]:
        out = bench.args.work / f"{bench.label}-{label}-b{bench.args.budget}-s{seed}"
        trials = load_result(out).trials
        whole = statistics.mean(t.seconds for t in trials if t.status == "completed")
        asked = len(bench.run.tasks) * len(trials)
        return {
            "time": 1 - sum(t.seconds for t in trials) / (len(trials) * whole),
            "scores": 1 - sum(len(t.scores or {}) for t in trials) / asked,
            "stopped": sum(t.status == "stopped" for t in trials),
        }

    return bench.cell(f"{label}-b{bench.args.budget}-s{seed}-cost", compute)


def main() -> None:
    bench, ends, plain = begun(options(__doc__.splitlines()[0]))
    args = bench.args
    keys: dict[str, Any] = {"anchor": args.anchor, "grams": "hybrid", "groups": "depth", "calibration": 64}
    lines = []
    for risk in RISKS:
        label = f"{args.anchor}-hybrid" + (f"-stop{risk}" if risk else "")
        extra = {"early_stopping": risk} if risk else {}
        found = [(s, f) for s in range(args.seeds) if (f := bench.tuned(label, s, **keys, **extra))]
        if not found:
            continue
        best = [f["objective"] for _, f in found]
        accuracy = cells([f for _, f in found], scores(plain["test"]), scores(ends["experts"]))
        costs = [c for s, _ in found if risk and (c := cost(bench, label, s))]
        saved = [f"{100 * statistics.mean(c[k] for c in costs):.0f} %" if costs else "" for k in ("time", "scores")]
        stopped = f"{statistics.mean(c['stopped'] for c in costs):.0f}" if costs else ""
        lines.append([f"{risk:g}", str(len(found)), f"{statistics.mean(best):.4f}", *accuracy, *saved, stopped])
    header = ["risk", "seeds", "validation objective", "test accuracy (%)", "gap closed"]
    header += ["time saved", "scores saved", "stopped"]
    publish(args, f"stopping {args.zoo}", f"{args.zoo}, {args.budget} trials\n\n{markdown(header, lines)}")


if __name__ == "__main__":
    main()
