"""The bar chart of per-task test accuracy, from the cells of zoo.py.

python benchmarks/pictures.py                  docs/pictures/vit8.svg and vit20.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

MODELS = (("base", "#bbbbbb"), ("TSV", "#e6a23c"), ("BMM", "#3c78d8"), ("expert", "#444444"))


def accuracies(work: Path, zoo: str, budget: int) -> dict[str, dict[str, float]]:
    """Accuracy by task for each model; raises FileNotFoundError where a cell is missing."""

    def read(name: str) -> dict:
        return json.loads((work / f"{zoo}-{name}.json").read_text())

    ends, plain, tuned = read("ends"), read("plain-tsv"), read(f"tsv-hybrid-b{budget}-s0")
    found = {"base": ends["base"], "TSV": plain["test"], "BMM": tuned["test"], "expert": ends["experts"]}
    return {model: {task: value for task, value, _ in rows} for model, rows in found.items()}


def draw(path: Path, found: dict[str, dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "bmm"
    from matplotlib import pyplot

    tasks = list(found["base"])
    figure, axis = pyplot.subplots(figsize=(1.6 + 0.62 * len(tasks), 3.6), layout="constrained")
    for n, (model, colour) in enumerate(MODELS):
        places = [i + 0.2 * (n - 1.5) for i in range(len(tasks))]
        axis.bar(places, [100 * found[model][t] for t in tasks], 0.2, label=model, color=colour)
    axis.set_xticks(range(len(tasks)), [t.replace("_", " ") for t in tasks], rotation=40, ha="right")
    axis.set(ylabel="test accuracy (%)", ylim=(0, 100))
    axis.legend(ncols=4, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, 1.12))
    axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/bench"))
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--budget", type=int, default=50)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for zoo in ("vit8", "vit20"):
        try:
            draw(args.out / f"{zoo}.svg", accuracies(args.work, zoo, args.budget))
        except FileNotFoundError as error:
            print(f"{zoo}: {error.filename} is missing; run benchmarks/zoo.py --zoo {zoo} --anchors tsv first")


if __name__ == "__main__":
    main()
