"""``bmm inspect``"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import common
from .output import emit

if TYPE_CHECKING:
    from bmm.inventory import Entry


@click.command("inspect")
@click.argument("checkpoints", nargs=-1, type=click.Path())
@click.option("--skip", multiple=True, metavar="PATTERN", help="Leave these parameters out (task heads). Repeatable.")
@click.option(
    "--groups", "scheme", default="depth", help="How modules would be grouped: global, depth, role, bands, module."
)
@click.option("--bands", default=4, show_default=True, help="Depth bands.")
@common
def command(
    checkpoints: tuple[str, ...],
    skip: tuple[str, ...],
    scheme: str,
    bands: int,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Show what checkpoints hold and whether they can be merged: the first is the base, the others experts.

    The base's modules are listed by role, shape and depth: what BMM solves, what stays with the anchor, what is a head,
    what is tied. Without arguments the embedded zoo is shown. Exits with 1 where they disagree.

    \b
    bmm inspect
    bmm inspect models/base models/a models/b
    bmm inspect models/base models/a --skip 'classifier.*' --groups bands
    """
    from bmm import zoo
    from bmm.checkpoint import ModelPool, open_checkpoint
    from bmm.groups import role_of, search_groups
    from bmm.inventory import inventory
    from bmm.layouts import matrix_layouts
    from bmm.report import markdown

    paths = list(checkpoints)
    if not paths:
        found = zoo.find("vit8")
        paths = [str(found.base), *map(str, found.experts.values())]
    opened = [open_checkpoint(p, skip=skip) for p in paths]
    data: dict[str, Any] = {"checkpoints": [_describe(c) for c in opened]}
    cells = [
        [d["path"], str(d["tensors"]), f"{d['parameters'] / 1e6:.2f} M", f"{d['bytes'] / 2**20:.1f}", d["dtypes"]]
        for d in data["checkpoints"]
    ]
    base = opened[0]
    entries = inventory({n: base.info(n) for n in base.names}, base.config, base.tied)
    data["modules"] = [entry.to_json() for entry in entries]
    parts = [markdown(["checkpoint", "tensors", "parameters", "MiB", "dtypes"], cells), _modules(entries)]
    if base.tied:
        parts.append("tied: " + "; ".join(" = ".join(t) for t in base.tied))
    if len(opened) > 1:
        pool = ModelPool(opened[0], opened[1:], task_names=_names(paths[1:]))
        pool.check_finite()
        layouts = matrix_layouts(pool, None)
        groups = search_groups(layouts, scheme, bands)
        rows = []
        for group in dict.fromkeys(groups.values()):
            names = [n for n in groups if groups[n] == group]
            size = sum(opened[0].info(n).numel for n in names)
            change = _relative_change(pool, names)
            rows.append([group, str(len(names)), f"{size / 1e6:.2f} M", f"{change:.3f}", names[0]])
        data["groups"] = [
            {"group": r[0], "modules": int(r[1]), "relative_change": float(r[3]), "roles": sorted({role_of(r[4])})}
            for r in rows
        ]
        data["agree"] = True
        parts += [
            f"base and {len(opened) - 1} experts agree in {len(pool.names)} tensors; all values finite",
            markdown(["group", "modules", "parameters", "tau / w0 (norms)", "first"], rows),
        ]
    emit("\n\n".join(parts), data, as_json)


def _modules(entries: Sequence[Entry]) -> str:
    from bmm.report import markdown

    heads = ["role", "shape", "blocks", "tensors", "parameters", "dtype", "merged", "first"]
    rows = [
        [e.role, " x ".join(map(str, e.shape)) or "scalar", e.depth, str(e.tensors), f"{e.parameters:,}", e.dtype,
         e.merged + (", tied" if e.tied else ""), e.first]
        for e in entries
    ]  # fmt: skip
    return markdown(heads, rows)


def _names(paths: list[str]) -> list[str]:
    names = [Path(p).stem for p in paths]
    return names if len(set(names)) == len(names) else paths


def _describe(checkpoint: Any) -> dict[str, Any]:
    infos = [checkpoint.info(n) for n in checkpoint.names]
    kinds = sorted({str(i.dtype).removeprefix("torch.") for i in infos})
    return {
        "path": str(checkpoint.path),
        "tensors": len(infos),
        "parameters": sum(i.numel for i in infos),
        "bytes": checkpoint.nbytes,
        "dtypes": ", ".join(kinds),
    }


def _relative_change(pool: Any, names: list[str]) -> float:
    """Mean over experts of |tau| / |w0| over a group's weights: how far fine-tuning went."""
    moved, size = 0.0, 0.0
    for name in names:
        taus = pool.task_vectors(name)
        moved = moved + taus.flatten(1).square().sum(1)
        size += float(pool.base[name].float().square().sum())
    return float((moved / max(size, 1e-30)).sqrt().mean())  # type: ignore[attr-defined]
