"""``bmm evaluate``"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from .options import INPUT, RUNTIME, common, load_recipe, recipe_options
from .output import Console, emit


@click.command("evaluate")
@click.argument("checkpoint", type=click.Path())
@click.option("--split", type=click.Choice(["validation", "test"]), default="test", show_default=True)
@recipe_options(*INPUT, *RUNTIME)
@common
def command(
    checkpoint: str, split: str, recipe: str | None, as_json: bool, quiet: bool, debug: bool, **values: Any
) -> None:
    """Score CHECKPOINT on every task.

    \b
    bmm evaluate runs/vit8-tsv-hybrid-seed0/model
    bmm evaluate merged --recipe mine.yaml --split validation --json
    """
    from bmm.api import evaluate
    from bmm.report import score_table

    chosen = load_recipe(recipe, values)
    with Console(quiet) as console:
        scores = evaluate(checkpoint, chosen, split=split, progress=console.stage)
    rows = [asdict(s) | {"standard_error": s.standard_error} for s in scores]
    emit(score_table({"checkpoint": scores}), {"split": split, "scores": rows}, as_json)
