"""``bmm merge``"""

from __future__ import annotations

from typing import Any

import click

from .options import ANCHOR, BMM, GRAMS, INPUT, OUTPUT, RUNTIME, common, load_recipe, recipe_options
from .output import Console, emit, written


@click.command("merge")
@click.option("--out", "-o", required=True, type=click.Path(file_okay=False), help="Folder for the merged checkpoint.")
@click.option("--lam", type=float, default=None, help="BMM with this prior precision for every group (inf: anchor).")
@click.option("--rho", type=float, default=1.0, show_default=True, help="Assembly scale that goes with --lam.")
@click.option("--study", type=click.Path(exists=True), help="Merge as the best trial of this study.")
@click.option("--trial", type=int, default=None, help="With --study: this trial in place of the best.")
@click.option("--from-mergekit", type=click.Path(dir_okay=False), help="Merge as this recipe of mergekit says.")
@click.option("--masks", is_flag=True, help="Keep a mask a task for `bmm reconstruct` (anchors emr, consensus_ta).")
@click.option("--overwrite", is_flag=True, help="Replace an existing output folder once the new one is whole.")
@recipe_options(*ANCHOR, *INPUT, *BMM, *GRAMS, *RUNTIME, *OUTPUT)
@common
def command(
    out: str,
    lam: float | None,
    rho: float,
    study: str | None,
    trial: int | None,
    from_mergekit: str | None,
    masks: bool,
    overwrite: bool,
    recipe: str | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **values: Any,
) -> None:
    """Merge once and write a checkpoint.

    Without --lam or --study the anchor method itself is the merge, streamed from disk to disk.

    \b
    bmm merge --anchor ties --knob density=0.3 --out merged
    bmm merge --base m/base --expert m/a --expert m/b --anchor task_arithmetic --out merged
    bmm merge --anchor task_arithmetic --weights mnist=-1 --out merged        forget a task
    bmm merge --anchor emr --masks --out merged                               bmm reconstruct merged --task NAME
    bmm merge --anchor tsv --grams datafree --lam 1 --out merged
    bmm merge --study runs/vit8-tsv-hybrid-seed0 --trial 7 --out merged
    bmm merge --from-mergekit config.yml --expert org/model=FOLDER --out merged
    """
    from bmm.api import merge, merge_mergekit

    from .options import collected

    if from_mergekit:
        if study or trial is not None or recipe or masks or lam is not None:
            raise click.UsageError("--from-mergekit is a recipe of its own; drop --recipe, --study, --lam and --masks")
        keys = _mergekit_keys(collected(values))
        with Console(quiet) as console:
            path = merge_mergekit(from_mergekit, out=out, overwrite=overwrite, progress=console.stage, **keys)
        emit(f"merged checkpoint: {path}", {"checkpoint": str(path)}, as_json)
        return

    if study and (lam is not None or recipe):
        raise click.UsageError("--study brings its own recipe and hyperparameters; drop --lam and --recipe")
    if trial is not None and not study:
        raise click.UsageError("--trial goes with --study")
    if masks and (study or lam is not None):
        raise click.UsageError("--masks goes with a plain merge; drop --study and --lam")
    source: dict[str, Any] = (
        {"study": study, "trial": trial, **collected(values)} if study else {"recipe": load_recipe(recipe, values)}
    )
    with Console(quiet) as console:
        path = merge(lam=lam, rho=rho, out=out, overwrite=overwrite, masks=masks, progress=console.stage, **source)
    line, found = written(path)
    emit(f"merged checkpoint: {path}{line}", {"checkpoint": str(path)} | found, as_json)


def _mergekit_keys(given: dict[str, Any]) -> dict[str, Any]:
    """The flags that go with a recipe of mergekit, as keywords of `bmm.merge_mergekit`."""
    taken = ("experts", "skip", "heads", "device", "dtype", "shard_gib")
    if others := [key for key in given if key not in taken]:
        flag = others[0].replace("_", "-")
        raise click.UsageError(f"--from-mergekit says what is merged and how; drop --{flag}")
    return {"models" if key == "experts" else key: value for key, value in given.items()}
