"""``bmm calibrate``"""

from __future__ import annotations

from typing import Any

import click

from .options import RUNTIME, collected, common, key_options
from .output import Console, emit


@click.command("calibrate")
@click.argument("run", type=click.Path())
@click.option("--samples", type=int, default=10, show_default=True, help="Models drawn from the posterior.")
@click.option("--seed", type=int, help="Seed of the draws.  [default: the study's]")
@click.option("--out", "-o", type=click.Path(dir_okay=False), help="Write the result as JSON to this file.")
@key_options(*RUNTIME)
@common
def command(
    run: str, samples: int, seed: int | None, out: str | None, as_json: bool, quiet: bool, debug: bool, **values: Any
) -> None:
    """Sample the posterior around the best merge of the finished study in RUN, and measure its calibration.

    The noise is chosen on validation data. Accuracy, negative log-likelihood and expected calibration error of the
    merge, the ensemble of samples, the merge with fitted temperatures, and the experts: on validation and test data.

    \b
    bmm calibrate runs/vit8-tsv-hybrid-seed0
    bmm calibrate runs/vit8-tsv-hybrid-seed0 --samples 30 --out calibration.json
    """
    from bmm.api import calibrate
    from bmm.report import calibration_report

    with Console(quiet) as console:
        found = calibrate(run, samples=samples, seed=seed, out=out, progress=console.stage, **collected(values))
    emit(calibration_report(found), found.to_json(), as_json)
