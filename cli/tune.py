"""``bmm tune``"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from .options import ANCHOR, BMM, GRAMS, INPUT, OUTPUT, RUNTIME, SEARCH, collected, common, load_recipe, recipe_options
from .output import Console, emit, written


@click.command("tune")
@click.option("--resume", type=click.Path(file_okay=False), help="Continue the study in this folder.")
@recipe_options(*ANCHOR, *SEARCH, *INPUT, *BMM, *GRAMS, *RUNTIME, *OUTPUT)
@common
def command(resume: str | None, recipe: str | None, as_json: bool, quiet: bool, debug: bool, **values: Any) -> None:
    """Search (lam, rho) for every module group; write the best merge, its card and a report.

    Trial 0 is the anchor and trial 1 the default, so the result is never below the anchor on validation.
    Stop with Ctrl-C at any time: --resume continues with the same trials.

    \b
    bmm tune --anchor tsv --budget 50
    bmm tune --zoo vit20 --anchor iso_c --grams datafree
    bmm tune --recipe mine.yaml --budget 100 --device cuda
    bmm tune --base m/base --expert a=m/a --expert b=m/b --tasks tasks.py:make
    bmm tune --groups bands --refine --holdout 0.25
    bmm tune --goal worst --floor 0.6 --floor mnist=0.8
    bmm tune --objectives mnist,scripts=thai+hebrew+latin
    bmm tune --budget 100 --workers 4 --device cuda
    bmm tune --resume runs/vit8-tsv-hybrid-seed0 --budget 80
    """
    from bmm.api import tune
    from bmm.report import text_report
    from bmm.tuning import RESUMABLE, default_out

    if resume:
        given = collected(values)
        refused = [k for k in given if k not in RESUMABLE]
        if refused or recipe:
            flag = "--recipe" if recipe else "--" + refused[0].replace("_", "-")
            can = ", ".join(f"--{k}" for k in RESUMABLE)
            raise click.UsageError(f"{flag} cannot change in a resumed study; only {can} can")
        out, budget, arguments = resume, _budget_of(resume, given), {"resume": resume, **given}
    else:
        chosen = load_recipe(recipe, values)
        out, budget = chosen.out or default_out(chosen), chosen.budget
        arguments = {"recipe": chosen, "out": out}
    try:
        # Standard output is the result's: what tasks and libraries print while they work is no part of it.
        with Console(quiet, budget) as console, contextlib.redirect_stdout(sys.stderr):
            result = tune(progress=console.stage, on_trial=console.trial, **arguments)
    except KeyboardInterrupt:
        from pathlib import Path

        if (Path(out) / "study.db").exists():
            click.echo(f"interrupted; nothing is lost. Continue with: bmm tune --resume {out}", err=True)
        else:
            click.echo("interrupted before the first trial; run the same command again", err=True)
        raise SystemExit(1) from None
    line, found = written(result.paths["checkpoint"])
    emit(text_report(result).rstrip() + line, result.to_json() | found, as_json)


def _budget_of(folder: str, given: dict[str, Any]) -> int:
    from bmm.search.database import StudyDatabase
    from bmm.tuning import study_file

    with StudyDatabase.open(study_file(folder), readonly=True) as database:
        return int(given.get("budget", database.meta()["recipe"]["budget"]))
