"""``bmm average``"""

from __future__ import annotations

from typing import Any

import click

from .options import common
from .output import Console, emit


@click.command("average")
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...")
@click.option("--out", "-o", required=True, type=click.Path(file_okay=False), help="Folder for the average.")
@click.option("--method", default="uniform", show_default=True, help="uniform, ema, lawa or swa.")
@click.option("--last", type=int, help="uniform, swa: the last so many checkpoints.  [default: all]")
@click.option("--share", type=float, help="uniform, swa: the last share of the checkpoints, 0 to 1.")
@click.option("--decay", type=float, help="ema: what each checkpoint leaves of the average before it.  [default: 0.9]")
@click.option("--window", type=int, help="lawa: checkpoints in a window.  [default: 6]")
@click.option("--interval", type=int, help="lawa: take every so many-th checkpoint, back from the last.  [default: 1]")
@click.option("--each", is_flag=True, help="lawa: write every window, a folder each, not the last alone.")
@click.option(
    "--batchnorm",
    help="BatchNorm statistics: recompute (swa, or with --tasks), last or average (the default of the others).",
)
@click.option("--tasks", metavar="FILE.py:FUNCTION", help="Tasks with calibration inputs, to recompute on.")
@click.option("--model", metavar="FILE.py:FUNCTION", help="Builds the model; from config.json by default.")
@click.option("--calibration", type=click.IntRange(min=1), help="Calibration inputs a task.  [default: all]")
@click.option("--device", default="cpu", show_default=True, help="Where statistics are recomputed.")
@click.option("--order", default="step", show_default=True, help="By step number in the names, or as given.")
@click.option("--dtype", default="same", show_default=True, help="Storage type: same, float32, bfloat16 or float16.")
@click.option("--shard-gib", type=float, default=4.0, show_default=True, help="Largest shard, in GiB.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output folder once the new one is whole.")
@common
def command(checkpoints: tuple[str, ...], as_json: bool, quiet: bool, debug: bool, **values: Any) -> None:
    """Average the checkpoints of ONE training run: folders, files, quoted globs, or the run's folder.

    They are put in order of the step numbers in their names. Experts of different tasks are for `bmm merge`.

    \b
    bmm average run/checkpoint-* --out averaged
    bmm average run --method uniform --last 5 --out averaged
    bmm average run --method ema --decay 0.8 --out averaged
    bmm average run --method lawa --window 6 --interval 2 --each --out windows
    bmm average 'run/*.safetensors' --method swa --tasks t.py:tasks --model t.py:model --out averaged
    """
    from bmm.api import average

    given = {name: value for name, value in values.items() if value is not None and value is not False}
    with Console(quiet) as console:
        paths = average(list(checkpoints), progress=console.stage, **given)
    found = [str(path) for path in paths] if isinstance(paths, list) else [str(paths)]
    data = {"checkpoints": found} if values["each"] else {"checkpoint": found[0]}
    emit("\n".join(f"averaged checkpoint: {path}" for path in found), data, as_json)
