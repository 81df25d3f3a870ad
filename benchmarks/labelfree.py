"""Tuning without labels against tuning with them: validation scores by agreement with the experts, or by labels.

    python benchmarks/labelfree.py                   vit8, TSV anchor, hybrid Grams, 50 trials, three seeds each
    python benchmarks/labelfree.py --zoo vit20
    python benchmarks/labelfree.py --print           the table of the cells that are there

Both search on the same validation images; "agreement" is given them without their labels. Test data are
scored once a finished study. Cells are files in --work, as in zoo.py, whose cells of labelled studies serve here too.
Errors are binomial standard errors of the mean over tasks, "sd" the standard deviation over seeds; "seeds better"
counts the seeds whose test accuracy is above the anchor's.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from zoo import Bench, begun, cells, mean, options, publish, scores

from bmm.report import markdown, mean_and_error, percent


def blindfolded(bench: Bench) -> Bench:
    """The same bench whose studies see neither test data nor validation labels."""
    other = copy.copy(bench)
    other.blind = [replace(task, validation=task.validation[0]) for task in bench.blind]
    return other


def table(bench: Bench, ends: dict[str, Any], plain: dict[str, Any]) -> list[list[str]]:
    """Base, anchor, both kinds of scores, experts: seeds, test accuracy, share of the gap closed."""
    args = bench.args
    anchor, experts = scores(plain["test"]), scores(ends["experts"])
    keys: dict[str, Any] = {"anchor": args.anchor, "grams": args.grams, "groups": "depth", "calibration": 64}
    label = f"{args.anchor}-{args.grams}"
    lines = [["base", "", percent(*mean_and_error(scores(ends["base"]))), "", ""]]
    lines.append([args.anchor, "", percent(*mean_and_error(anchor)), "", ""])
    studies = {
        "labels": (bench, label, {}),
        "agreement": (blindfolded(bench), f"{label}-agreement", {"score_by": "agreement"}),
    }
    for name, (seen, cell, extra) in studies.items():
        found = [f for seed in range(args.seeds) if (f := seen.tuned(cell, seed, **keys, **extra))]
        if found:
            better = sum(mean(scores(f["test"])) > mean(anchor) for f in found)
            lines.append([name, str(len(found)), *cells(found, anchor, experts), f"{better} of {len(found)}"])
    lines.append(["experts", "", percent(*mean_and_error(experts)), "", ""])
    return lines


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--grams", default="hybrid", choices=("data", "datafree", "hybrid"))
    bench, ends, plain = begun(parser)
    args = bench.args
    header = ["scored by", "seeds", "test accuracy (%)", "gap closed", "seeds better"]
    text = (
        f"{args.zoo}, {len(bench.run.tasks)} tasks, {args.budget} trials, anchor {args.anchor}, {args.grams} Grams, "
        f"autocast {args.autocast}\n\n" + markdown(header, table(bench, ends, plain))
    )
    publish(args, f"labelfree {args.zoo}", text)


if __name__ == "__main__":
    main()
