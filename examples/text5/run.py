"""The table of text5: base, experts, plain merges, and BMM on some of them.

python -m examples.text5.run                                   all of it; rows that are there are not made again
python -m examples.text5.run --tuned tsv --sources hybrid      fewer rows
"""

from __future__ import annotations

from pathlib import Path

import bmm
from examples import compare

HERE = Path(__file__).parent
TUNED = ("tsv", "iso_cts", "task_arithmetic")


def main() -> None:
    parser = compare.options("The table of text5.", "runs/text5", TUNED)
    parser.add_argument("--recipe", type=Path, default=HERE / "recipe.yaml")
    args = parser.parse_args()
    recipe = bmm.make_recipe(args.recipe).to_dict()
    comparison = compare.Comparison(recipe, args)
    tests = sum(len(task.test[1]) for task in comparison.run.tasks)
    head = (
        f"test accuracy (%), {tests} texts; BMM: {args.budget} trials, {args.calibration} calibration texts a task, "
        f"groups {recipe['groups']}, autocast {recipe['autocast']}"
    )
    compare.main(comparison, "text5", head)


if __name__ == "__main__":
    main()
