"""What every part of BMM adds: one study a variant, TSV anchor, validation and test side by side.

    python benchmarks/ablation.py                        all variants on vit8
    python benchmarks/ablation.py --zoo vit20 --seeds 3
    python benchmarks/ablation.py --variants full norms --budget 6

Choices are made on the validation objective; test data are scored once a finished study. Cells are files in --work, as
in zoo.py, whose cells serve here too. Errors are binomial standard errors of the mean over tasks, "sd" the standard
deviation over seeds.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from zoo import Bench, cells, options, publish, scores

from bmm.report import markdown

VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "data": ("data Grams, bias joined", {}),
    "no-bias": ("without bias in the regression", {"bias": "anchor"}),
    "norms": ("+ norms", {"norms": "regression"}),
    "merged": ("+ inputs of the merged model", {"inputs": "merged"}),
    "weights": ("+ task weights searched", {"search": ["weights"]}),
    "hybrid": ("+ hybrid Grams, gamma 0.5 (the default)", {"grams": "hybrid", "gamma": 0.5}),
    "gamma": ("+ hybrid Grams, gamma searched", {"grams": "hybrid", "search": ["gamma"]}),
    "anchor-scale": ("+ anchor scale searched", {"search": ["anchor_scale"]}),
}


def row(bench: Bench, name: str) -> list[str] | None:
    """Validation objective, test accuracy, gap closed and median seconds a trial of one variant."""
    args = bench.args
    text, extra = VARIANTS[name]
    keys: dict[str, Any] = {"anchor": args.anchor, "grams": "data", "groups": "depth", "calibration": 64} | extra
    found = [f for seed in range(args.seeds) if (f := bench.tuned(f"{args.anchor}-{name}", seed, **keys))]
    ends, plain = bench.ends(), bench.plain(args.anchor)
    if not found or ends is None or plain is None:
        return None
    best = [f["objective"] for f in found]
    spread = f" (sd {statistics.stdev(best):.4f})" if len(best) > 1 else ""
    seconds = [f"{statistics.median(f[k] for f in found):.2f}" for k in ("suggest", "evaluate")]
    accuracy = cells(found, scores(plain["test"]), scores(ends["experts"]))
    return [text, str(len(found)), f"{statistics.mean(best):.4f}{spread}", *accuracy, *seconds]


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--anchor", default="tsv")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    rows = []
    for name in args.variants:
        line = row(bench, name)
        if line is not None:
            rows.append(line)
            if not args.print:
                print(" | ".join(line), flush=True)
    header = ["variant", "seeds", "validation objective", "test accuracy", "gap closed", "suggest s", "evaluate s"]
    title = f"{args.zoo}, anchor {args.anchor}, {args.budget} trials, autocast {args.autocast}"
    publish(args, f"ablation {args.zoo}", f"{title}\n\n{markdown(header, rows)}")


if __name__ == "__main__":
    main()
