"""bmm against mergekit 0.1.5, whole checkpoints through its merge plan: python benchmarks/crosscheck/with_mergekit.py

Arithmetic is asked for in float32. Random masks differ by nature: DARE and DELLA are compared where nothing is dropped.
"""

from __future__ import annotations

import json
from pathlib import Path

from common import Model, Row, load_file, main

MASKS = "random masks differ; compared without dropping"
SUM = "sums what agrees (normalize: false); ours averages by default"
ROWS = (
    Row("average", "linear weight=1"),
    Row("task_arithmetic", "task_arithmetic weight=0.4", "", {"scale": 0.4}),
    Row("ties", "ties weight=1 density=0.5", "trims tensor by tensor, not over the model", {"density": 0.5}),
    Row("ties", "ties weight=1 density=0.5", "", {"density": 0.5}, alone=True),
    Row("dare_ta", "dare_linear weight=0.4 density=1", MASKS, {"drop": 0.0, "scale": 0.4}),
    Row(
        "dare_ties", "dare_ties weight=1 density=1", f"{MASKS}; {SUM}", {"drop": 0.0, "density": 1.0, "reduce": "sum"}
    ),
    Row(
        "breadcrumbs", "breadcrumbs weight=0.4 density=0.75 gamma=0.0625", "",
        {"beta": 0.1875, "gamma": 0.9375, "fuse": "sum", "scale": 0.4},
    ),
    Row(
        "breadcrumbs", "breadcrumbs_ties weight=1 density=0.75 gamma=0.0625", SUM,
        {"beta": 0.1875, "gamma": 0.9375, "fuse": "agree_sum", "scale": 1.0},
    ),
    Row("della", "della weight=1 density=1", MASKS, {"drop": 0.0, "epsilon": 0.0, "fuse": "agree_mean", "scale": 1.0}),
    Row("model_stock", "model_stock"),
    Row("slerp", "slerp t=0.3", "", {"t": 0.3}, experts=2),
    Row("multi_slerp", "multislerp weight=1", "", {"space": "task_vectors"}),
    Row("karcher", "karcher", "stops at 1e-5 radians, ours at 1e-7"),
)  # fmt: skip


def peer(folder: Path, row: Row) -> Model:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    name, *options = row.theirs.split()
    given = {key: float(value) for key, value in (option.split("=") for option in options)}
    models = [{"model": str(folder / f"e{t + 1}"), "parameters": given} for t in range(row.experts)]
    config = {"merge_method": name, "models": models, "dtype": "float32"}
    if name == "slerp":  # its base is one end of the arc
        config |= {"base_model": models[0]["model"], "parameters": given}
        config["models"] = [{"model": model["model"]} for model in models]
    elif name not in ("linear", "karcher"):
        config["base_model"] = str(folder / "base")
    out = folder / "mergekit"
    run_merge(
        MergeConfiguration.model_validate(json.loads(json.dumps(config))), str(out), MergeOptions(copy_tokenizer=False)
    )
    return load_file(out / "model.safetensors")


if __name__ == "__main__":
    main("mergekit", "0.1.5", __file__, ROWS, peer)
