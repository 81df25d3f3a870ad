"""``bmm gram``"""

from __future__ import annotations

from typing import Any

import click

from .options import GRAMS, INPUT, RUNTIME, common, load_recipe, recipe_options
from .output import Console, emit


@click.command("gram")
@recipe_options(*GRAMS, *INPUT, *RUNTIME)
@common
def command(recipe: str | None, as_json: bool, quiet: bool, debug: bool, **values: Any) -> None:
    """Collect every expert's activation Grams into the cache, so that later runs find them there.

    \b
    bmm gram
    bmm gram --recipe mine.yaml --calibration 128 --cache grams
    """
    from bmm.api import collect_grams
    from bmm.report import markdown
    from bmm.statistics import cache_folder

    chosen = load_recipe(recipe, values)
    with Console(quiet) as console:
        grams = collect_grams(chosen, cached=True, progress=console.stage)
    rows: list[dict[str, Any]] = [
        {
            "task": name,
            "modules": len(g.key_of),
            "grams": len(g.grams),
            "rows": max(g.count.values(), default=0),
            "bytes": sum(t.numel() * t.element_size() for t in g.grams.values()),
        }
        for name, g in grams.items()
    ]
    cells = [
        [str(r["task"]), *[str(r[k]) for k in ("modules", "grams", "rows")], f"{r['bytes'] / 2**20:.1f}"] for r in rows
    ]
    text = markdown(["task", "modules", "distinct Grams", "rows", "MiB"], cells)
    folder = cache_folder(chosen) / "grams"
    emit(f"{text}\ncached in {folder}", {"cache": str(folder), "tasks": rows}, as_json)
