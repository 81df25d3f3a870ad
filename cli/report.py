"""``bmm report``"""

from __future__ import annotations

import click

from .output import emit


@click.command("report")
@click.argument("folder", type=click.Path())
@click.option("--trials", is_flag=True, help="Also list every trial.")
@click.option("--pareto", type=click.Path(dir_okay=False), help="Write the Pareto front as a figure: FILE.html.")
@click.option("--analysis", is_flag=True, help="Also say which hyperparameters mattered and how sure the best is.")
@click.option("--figures", type=click.Path(file_okay=False), help="Write the analysis as HTML figures to this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(
    folder: str, trials: bool, pareto: str | None, analysis: bool, figures: str | None, as_json: bool, debug: bool
) -> None:
    """Show what the study in FOLDER found; a running or interrupted one shows its trials so far.

    \b
    bmm report runs/vit8-tsv-hybrid-seed0
    bmm report runs/vit8-tsv-hybrid-seed0 --trials
    bmm report runs/vit8-tsv-hybrid-seed0 --json > result.json
    bmm report runs/two-objectives --pareto front.html
    bmm report runs/vit8-tsv-hybrid-seed0 --analysis --figures figures
    """
    from bmm.api import analyse, load_study
    from bmm.report import pareto_figure, text_report, trial_table, write_figure, write_figures

    result = load_study(folder)
    text, data = text_report(result), result.to_json()
    if trials:
        text += "\n## Trials\n\n" + trial_table(result.trials, result.violations)
    front = [write_figure(pareto_figure(result), pareto)] if pareto else []
    found = analyse(folder) if analysis or figures else None
    files = front + (write_figures(found, figures) if found is not None and figures else [])
    if found is not None and analysis:
        data["analysis"] = found.to_json()
    if files:
        data["figures"] = [str(f) for f in files]
    emit(text, data, as_json)
    if as_json:
        return
    if found is not None and analysis:
        from .findings import show

        show(found)
    if files:
        click.echo("\n## Figures\n\n" + "\n".join(map(str, files)))
