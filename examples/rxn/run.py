"""The table of rxn: how much of both published experts survives in one model.

python -m examples.rxn.run
"""

from __future__ import annotations

from pathlib import Path

from examples import compare
from examples.rxn import tasks

HERE = Path(__file__).parent


def main() -> None:
    parser = compare.options("The table of rxn.", "runs/rxn", ("tsv", "task_arithmetic"))
    parser.set_defaults(
        anchors=["average", "task_arithmetic", "ties", "tsv", "iso_c", "iso_cts", "wudi_exact", "regmean"]
    )
    parser.add_argument("--models", type=Path, default=HERE / "models")
    args = parser.parse_args()
    experts = {name: str(args.models / name) for name in ("classes", "fingerprint")}
    keys = {"base": str(args.models / "base"), "experts": experts, "skip": ["classifier.*"]}
    comparison = compare.Comparison(keys, args, tasks.make(args.models))
    head = (
        f"{tasks.SIZES['test']} made-up reactions, no labels; classes: agreement with the expert's class (%), "
        f"fingerprint: 100 x cosine with the expert's; BMM: {args.budget} trials"
    )
    compare.main(comparison, "rxn", head, means=False)


if __name__ == "__main__":
    main()
