"""``bmm reconstruct``"""

from __future__ import annotations

import click

from bmm.recipe import DTYPES

from .options import common
from .output import Console, emit


@click.command("reconstruct")
@click.argument("folder", type=click.Path(file_okay=False))
@click.option("--task", required=True, help="Which of the merged experts: the name it was merged under.")
@click.option("--out", "-o", required=True, type=click.Path(file_okay=False), help="Folder for the task's checkpoint.")
@click.option("--base", type=click.Path(), default=None, help="Where the base is now, if it has moved since the merge.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="same", show_default=True, help="Storage type; same: base's."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output folder once the new one is whole.")
@common
def command(
    folder: str,
    task: str,
    out: str,
    base: str | None,
    dtype: str,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Write one task's own model from a FOLDER that was merged with --masks.

    The base must be the very one of the merge; the experts are no longer needed.

    \b
    bmm merge --anchor emr --masks --out merged
    bmm reconstruct merged --task mnist --out mnist
    bmm reconstruct merged --task mnist --base moved/base --dtype float32 --out mnist
    """
    from bmm.api import reconstruct

    with Console(quiet) as console:
        path = reconstruct(folder, task, out=out, base=base, dtype=dtype, overwrite=overwrite, progress=console.stage)
    emit(f"reconstructed checkpoint: {path}", {"checkpoint": str(path), "task": task}, as_json)
