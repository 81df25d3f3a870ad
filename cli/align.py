"""``bmm align``"""

from __future__ import annotations

from typing import Any

import click

from .options import common
from .output import Console, emit


@click.command("align")
@click.argument("reference", type=click.Path())
@click.argument("experts", nargs=-1, required=True, metavar="EXPERT...")
@click.option("--out", "-o", type=click.Path(file_okay=False), help="Write each aligned expert to DIR/NAME.")
@click.option("--spec", type=click.Path(dir_okay=False), help="YAML of what is permuted together; found without.")
@click.option("--show-spec", is_flag=True, help="Print the spec that would be used, as YAML, and stop.")
@click.option(
    "--tasks", help="FILE.py:FUNCTION that returns a list of bmm.Task: for barriers and to trace the network."
)
@click.option("--model", help="FILE.py:FUNCTION that builds the network (default: from the reference's config.json).")
@click.option(
    "--to", type=click.Choice(["first", "mean"]), default="first", show_default=True,
    help="Match each expert to the reference, or to the mean of all other models.",
)  # fmt: skip
@click.option("--within", type=click.Choice(["none", "vo", "qkvo"]), default="none", show_default=True,
              help="Permute inside attention heads too: v with o; q with k as well (never with rotary).")  # fmt: skip
@click.option("--heads", type=click.IntRange(1), default=None, help="Attention heads, where config.json does not say.")
@click.option("--residual", is_flag=True, help="Permute a transformer's residual stream too (needs --tasks).")
@click.option("--points", type=click.IntRange(3), default=11, show_default=True, help="Models on a barrier's line.")
@click.option("--skip", multiple=True, metavar="PATTERN", help="Leave these parameters out (task heads). Repeatable.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Order of the matching's steps.")
@click.option("--device", default="cpu", show_default=True, help="Where barriers are measured.")
@click.option("--overwrite", is_flag=True, help="Replace existing output folders once the new ones are whole.")
@common
def command(
    reference: str,
    experts: tuple[str, ...],
    out: str | None,
    spec: str | None,
    show_spec: bool,
    tasks: str | None,
    model: str | None,
    skip: tuple[str, ...],
    device: str,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Permute EXPERTs that share no base into REFERENCE's basin (Git Re-Basin), so that they can be merged.

    Each aligned expert computes exactly what it did before. Experts are paths, or NAME=PATH.

    \b
    bmm align m/a m/b --out aligned
    bmm align m/a m/b m/c --to mean --model net.py:model --tasks net.py:tasks --out aligned
    bmm align m/a m/b --show-spec > spec.yaml
    bmm merge --base m/a --expert m/a --expert aligned/b --anchor average --out merged
    """
    from bmm.api import align
    from bmm.rebasin import Aligner, Options

    from .options import collected

    if not show_spec and out is None and tasks is None:
        raise click.UsageError("nothing to do: give --out to write the aligned experts, --tasks to measure barriers")
    named = collected({"experts": experts})["experts"]
    if len(named) < len(experts):
        raise click.UsageError("two experts have the same name; write NAME=PATH")
    with Console(quiet) as console:
        common_keys: dict[str, Any] = {
            "spec": spec, "tasks": tasks, "model": model, "skip": skip, "device": device, "progress": console.stage,
        }  # fmt: skip
        if show_spec:
            found = Aligner(reference, named, options=Options(**options), **common_keys).spec
        else:
            result = align(reference, named, out=out, overwrite=overwrite, **common_keys, **options)
    if show_spec:
        import yaml

        notices = "".join(f"# {notice}\n" for notice in found.notices)
        emit(notices + found.to_yaml(), yaml.safe_load(found.to_yaml()) | {"notices": list(found.notices)}, as_json)
        return
    emit(_text(result), result.to_json(), as_json)


def _text(result: Any) -> str:
    from bmm.report import markdown, percent

    rows = [
        [name, f"{before:.4f}", f"{after:.4f}", percent(permutation.moved)]
        for (name, permutation), (before, after) in zip(
            result.permutations.items(), result.matching.similarity, strict=True
        )
    ]
    history = result.matching.history
    parts = [
        f"{len(result.spec.groups)} groups of units; objective {history[0]:.6g} to {history[-1]:.6g} in "
        f"{result.matching.passes} passes",
        markdown(["expert", "cosine before", "after", "units moved (%)"], rows),
    ]
    parts += [f"note: {notice}" for notice in result.spec.notices]
    if result.barriers:
        cells = [
            [name, kind, "-" if b.loss is None else f"{b.loss:.4f}", percent(b.score), percent(b.scores[_middle(b)])]
            for name, kinds in result.barriers.items()
            for kind, b in kinds.items()
        ]
        header = ["expert", "matching", "loss barrier", "score barrier (%)", "score halfway (%)"]
        parts += ["Barriers to the reference, on validation data", markdown(header, cells)]
    parts += [f"aligned {name}: {path}" for name, path in result.paths.items()]
    return "\n\n".join(parts)


def _middle(barrier: Any) -> int:
    """The point nearest to halfway."""
    return min(range(len(barrier.alphas)), key=lambda k: abs(barrier.alphas[k] - 0.5))
