"""``bmm save``"""

from __future__ import annotations

from typing import Any

import click

from .options import OUTPUT, collected, common, key_options
from .output import Console, emit, written


@click.command("save")
@click.argument("study", type=click.Path())
@click.option("--trial", type=int, default=None, help="Which trial to save; without it, the study's best.")
@click.option("--out", "-o", required=True, type=click.Path(file_okay=False), help="Folder for the merged checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output folder once the new one is whole.")
@key_options("device", "cache", *OUTPUT)
@common
def command(
    study: str,
    trial: int | None,
    out: str,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **values: Any,
) -> None:
    """Write one trial of a study as a checkpoint with its card: a point of the Pareto front, or any other.

    \b
    bmm report runs/vit8-tsv-hybrid-seed0 --trials
    bmm save runs/vit8-tsv-hybrid-seed0 --trial 17 --out chosen
    bmm save runs/vit8-tsv-hybrid-seed0 --out best --dtype bfloat16
    """
    from bmm.api import save

    with Console(quiet) as console:
        path = save(study, trial, out=out, overwrite=overwrite, progress=console.stage, **collected(values))
    line, found = written(path)
    emit(f"saved checkpoint: {path}{line}", {"checkpoint": str(path)} | found, as_json)
