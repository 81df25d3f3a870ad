"""``bmm anchors``"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .output import emit

FOOTER = """

METHOD+lines is METHOD with a factor that rises with depth (LiNeS): tsv+lines, ties+lines, ...
path:FOLDER takes any checkpoint merged elsewhere. Details: bmm anchors NAME"""


@click.command("anchors")
@click.argument("name", required=False)
@click.option("--write", "folder", type=click.Path(file_okay=False), help="Write the page of every method there.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(name: str | None, folder: str | None, as_json: bool, debug: bool) -> None:
    """List the merge methods; with NAME, its page: paper, formula, knobs, needs, cost, when to use it.

    \b
    bmm anchors
    bmm anchors ties
    bmm anchors tsv+lines
    """
    from bmm import anchors
    from bmm.report import markdown, method_page, write_pages

    if name and folder:
        raise click.UsageError("--write writes the pages of all methods; drop NAME")
    rows = [anchors.get(name)] if name else list(anchors.ANCHORS.values())
    data = [_row(a) for a in rows]
    if folder:
        paths = write_pages(Path(folder))
        emit(f"{len(paths)} pages in {folder}", [str(p) for p in paths], as_json)
    elif name:
        emit(method_page(rows[0]).rstrip(), data[0], as_json)
    else:
        cells = [[a.name, a.title, ", ".join(sorted(a.needs)) or "-", _knobs(a), a.paper.split(",")[0]] for a in rows]
        text = markdown(["anchor", "method", "needs", "knobs", "arXiv"], cells)
        emit(text + FOOTER, data, as_json)


def _knobs(anchor: Any) -> str:
    return ", ".join(f"{k.name}={k.default}" for k in anchor.knobs) or "-"


def _row(anchor: Any) -> dict[str, Any]:
    from bmm.report import knob_range

    knobs = [
        {"name": k.name, "default": k.default, "range": knob_range(k), "kind": k.kind, "help": k.help}
        for k in anchor.knobs
    ]
    return {
        "name": anchor.name,
        "title": anchor.title,
        "paper": anchor.paper,
        "summary": anchor.summary,
        "formula": anchor.formula,
        "cost": anchor.cost,
        "when": anchor.when,
        "needs": sorted(anchor.needs),
        "weights": anchor.weights,
        "experts": list(anchor.experts),
        "knobs": knobs,
    }
