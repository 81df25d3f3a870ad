"""bmm against peft 0.21.0's `merge_utils`, tensor by tensor: python benchmarks/crosscheck/with_peft.py

Random masks differ by nature: DARE is compared where nothing is dropped.
"""

from __future__ import annotations

from pathlib import Path

import torch
from common import Model, Row, main, task_vectors

MASKS = "random masks differ; compared without dropping"
ROWS = (
    Row("task_arithmetic", "task_arithmetic weights=0.4", "", {"scale": 0.4}),
    Row("ties", "ties density=0.5", "trims tensor by tensor, not over the model", {"density": 0.5}),
    Row("ties", "ties density=0.5", "", {"density": 0.5}, alone=True),
    Row("dare_ta", "dare_linear density=1", MASKS, {"drop": 0.0, "scale": 1.0}),
    Row("dare_ties", "dare_ties density=1", MASKS, {"drop": 0.0, "density": 1.0}),
    Row(
        "breadcrumbs", "magnitude_prune density=0.5", "has no outlier mask; compared without",
        {"beta": 0.5, "gamma": 1.0, "fuse": "sum", "scale": 1.0},
    ),
)  # fmt: skip


def peer(folder: Path, row: Row) -> Model:
    from peft.utils import merge_utils

    name, *options = row.theirs.split()
    given = {key: float(value) for key, value in (option.split("=") for option in options)}
    weights = torch.full((row.experts,), given.pop("weights", 1.0))
    base, taus = task_vectors(folder, row.experts)
    function = getattr(merge_utils, name)
    return {n: w + function([tau[n] for tau in taus], weights, **given) for n, w in base.items()}


if __name__ == "__main__":
    main("peft", "0.21.0", __file__, ROWS, peer)
