"""``bmm report``"""

from __future__ import annotations

import click

from .output import emit


@click.command("report")
@click.argument("folder", type=click.Path())
@click.option("--trials", is_flag=True, help="Also list every trial.")
@click.option("--pareto", type=click.Path(dir_okay=False), help="Write the Pareto front as a figure: FILE.html.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(folder: str, trials: bool, pareto: str | None, as_json: bool, debug: bool) -> None:
    """Show what the study in FOLDER found; a running or interrupted one shows its trials so far.

    \b
    bmm report runs/vit8-tsv-hybrid-seed0
    bmm report runs/vit8-tsv-hybrid-seed0 --trials
    bmm report runs/vit8-tsv-hybrid-seed0 --json > result.json
    bmm report runs/two-objectives --pareto front.html
    """
    from bmm.api import load_study
    from bmm.report import pareto_figure, text_report, trial_table, write_figure

    result = load_study(folder)
    text = text_report(result)
    if trials:
        text += "\n## Trials\n\n" + trial_table(result.trials, result.violations)
    if pareto:
        text += f"\nfigure: {write_figure(pareto_figure(result), pareto)}\n"
    emit(text, result.to_json(), as_json)
