"""``bmm inspect``"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import common, key_options
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
@key_options("vocabulary", "heads")
@common
def command(
    checkpoints: tuple[str, ...],
    skip: tuple[str, ...],
    scheme: str,
    bands: int,
    vocabulary: str | None,
    heads: str | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Show what checkpoints hold and whether they can be merged: the first is the base, the others experts.

    The base's modules are listed by role, shape and depth: what BMM solves, what stays with the anchor, what is a head,
    what is tied. Experts may be PEFT adapters; one can be looked at alone. Without arguments the embedded zoo is shown.
    Exits with 1 where they disagree.

    \b
    bmm inspect
    bmm inspect models/base models/a models/b
    bmm inspect models/base models/a --skip 'classifier.*' --groups bands
    """
    from bmm import zoo
    from bmm.checkpoint import AdapterCheckpoint, ModelPool, is_adapter, open_checkpoint, open_model
    from bmm.groups import role_of, search_groups
    from bmm.inventory import inventory
    from bmm.layouts import matrix_layouts
    from bmm.loading import stored_as
    from bmm.report import markdown

    paths = list(checkpoints)
    if not paths:
        found = zoo.find("vit8")
        paths = [str(found.base), *map(str, found.experts.values())]
    if len(paths) == 1 and is_adapter(Path(paths[0])):
        _show_adapter(paths[0], as_json)
        return
    opened = [open_checkpoint(paths[0], skip=skip)]
    opened += [open_model(p, opened[0], skip, stored_as) for p in paths[1:]]
    data: dict[str, Any] = {"checkpoints": [_describe(c) for c in opened]}
    cells = [
        [d["path"], str(d["tensors"]), f"{d['parameters'] / 1e6:.2f} M", f"{d['bytes'] / 2**20:.1f}", d["dtypes"]]
        for d in data["checkpoints"]
    ]
    base = opened[0]
    entries = inventory({n: base.info(n) for n in base.names}, base.config, base.tied)
    data["modules"] = [entry.to_json() for entry in entries]
    parts = [markdown(["checkpoint", "tensors", "parameters", "MiB", "dtypes"], cells)]
    parts += [f"{c.path}: {_adapter_line(c.summary)}" for c in opened if isinstance(c, AdapterCheckpoint)]
    for checkpoint, entry in zip(opened, data["checkpoints"], strict=True):
        if entry["heads"]:
            parts.append(f"{checkpoint.path}: heads: {', '.join(entry['heads'])}")
    parts.append(_modules(entries))
    if base.tied:
        parts.append("tied: " + "; ".join(" = ".join(t) for t in base.tied))
    if len(opened) > 1:
        chosen = (vocabulary or "refuse", heads or "refuse")
        pool = ModelPool.open(paths[0], paths[1:], skip, _names(paths[1:]), stored_as, *chosen)
        pool.check_finite()
        layouts = matrix_layouts(pool, None)
        groups = search_groups(layouts, scheme, bands)
        rows = []
        for group in dict.fromkeys(groups.values()):
            names = [n for n in groups if groups[n] == group]
            size = sum(pool.info(n).numel for n in names)
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
        parts += [f"note: {notice}" for notice in pool.notices]
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


def _show_adapter(path: str, as_json: bool) -> None:
    from bmm.checkpoint import describe_adapter
    from bmm.report import markdown

    found = describe_adapter(path)
    cells = [[path, str(found["tensors"]), f"{found['parameters'] / 1e6:.2f} M", f"{found['bytes'] / 2**20:.1f}"]]
    text = [
        markdown(["adapter", "tensors", "parameters", "MiB"], cells),
        _adapter_line(found),
        f"trained on {found['base'] or 'a base it does not name'}; give that base first to see what it changes",
    ]
    emit("\n\n".join(text), {"adapter": {"path": path, **found}}, as_json)


def _adapter_line(found: dict[str, Any]) -> str:
    """An adapter in a line: kind, ranks, scaling, and what else it changes."""
    numbers = {key: ", ".join(f"{x:g}" for x in found[key]) for key in ("ranks", "scalings")}
    parts = [f"{found['kind']}, rank {numbers['ranks']}, scaling {numbers['scalings']}, {found['modules']} modules"]
    if found["full_tensors"]:
        parts.append(f"{len(found['full_tensors'])} tensors in full ({', '.join(found['full_tensors'][:3])} ...)")
    if found["trained_tokens"]:
        parts.append(f"trained tokens of {', '.join(found['trained_tokens'])}")
    return "; ".join(parts)


def _describe(checkpoint: Any) -> dict[str, Any]:
    from bmm.checkpoint.heads import heads_in

    infos = [checkpoint.info(n) for n in checkpoint.names]
    kinds = sorted({str(i.dtype).removeprefix("torch.") for i in infos})
    return {
        "path": str(checkpoint.path),
        "tensors": len(infos),
        "parameters": sum(i.numel for i in infos),
        "bytes": checkpoint.nbytes,
        "dtypes": ", ".join(kinds),
        "heads": heads_in(checkpoint),
    } | ({"adapter": checkpoint.summary} if hasattr(checkpoint, "summary") else {})


def _relative_change(pool: Any, names: list[str]) -> float:
    """Mean over experts of |tau| / |w0| over a group's weights: how far fine-tuning went."""
    moved, size = 0.0, 0.0
    for name in names:
        taus = pool.task_vectors(name)
        moved = moved + taus.flatten(1).square().sum(1)
        size += float(pool.base[name].float().square().sum())
    return float((moved / max(size, 1e-30)).sqrt().mean())  # type: ignore[attr-defined]
