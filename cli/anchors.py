"""``bmm anchors``"""

from __future__ import annotations

from typing import Any

import click

from .output import emit


@click.command("anchors")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(name: str | None, as_json: bool, debug: bool) -> None:
    """List the merge methods; with NAME, its paper and knobs.

    \b
    bmm anchors
    bmm anchors ties
    """
    from bmm import anchors
    from bmm.report import markdown

    rows = [anchors.get(name)] if name else list(anchors.ANCHORS.values())
    data = [_row(a) for a in rows]
    if name:
        row = rows[0]
        needs = ", ".join(sorted(row.needs)) or "weights only"
        parts = [f"{row.name}: {row.title}", row.summary, f"paper: {row.paper}", f"needs: {needs}"]
        if row.knobs:
            knobs = [[k.name, str(k.default), _range(k), k.help] for k in row.knobs]
            parts.append(markdown(["knob", "default", "range", "meaning"], knobs))
        parts.append(f"merge: bmm merge --anchor {row.name} --out merged\ntune around it: bmm tune --anchor {row.name}")
        emit("\n\n".join(parts), data[0], as_json)
        return
    cells = [[a.name, ", ".join(f"{k.name}={k.default}" for k in a.knobs) or "-", a.paper] for a in rows]
    text = markdown(["anchor", "knobs", "paper"], cells)
    emit(text + "\n\npath:FOLDER takes any checkpoint merged elsewhere. Details: bmm anchors NAME", data, as_json)


def _range(knob: Any) -> str:
    return " or ".join(map(str, knob.choices)) if knob.choices else f"{knob.low:g} to {knob.high:g}"


def _row(anchor: Any) -> dict[str, Any]:
    knobs = [
        {"name": k.name, "default": k.default, "range": _range(k), "kind": k.kind, "help": k.help} for k in anchor.knobs
    ]
    return {
        "name": anchor.name,
        "title": anchor.title,
        "paper": anchor.paper,
        "summary": anchor.summary,
        "needs": sorted(anchor.needs),
        "knobs": knobs,
    }
