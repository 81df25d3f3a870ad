"""A page a merge method and an index of them all, made of the registry's rows and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ..anchors import ANCHORS, Anchor, Knob, get
from ..anchors.anchor import NEEDS
from .layout import markdown

_WEIGHTS = {
    "": "none",
    "positive": "any number >= 0; 0 leaves the expert out",
    "any": "any number; 0 leaves the expert out, a negative weight forgets its task",
}


def knob_range(knob: Knob) -> str:
    """The values a knob takes, for a table."""
    if knob.choices:
        return " or ".join(knob.choices)
    return f"{'-inf' if knob.low is None else f'{knob.low:g}'} to {'inf' if knob.high is None else f'{knob.high:g}'}"


def expert_range(anchor: Anchor) -> str:
    """How many experts a method takes, in words."""
    fewest, most = anchor.experts
    if most is None:
        return "any number" if fewest == 1 else f"at least {fewest}"
    return f"exactly {fewest}" if fewest == most else f"{fewest} to {most}"


def paper_link(anchor: Anchor) -> str:
    """The paper as a link to arXiv."""
    number, _, title = anchor.paper.partition(", ")
    return f"[{title}](https://arxiv.org/abs/{number}) (arXiv {number})"


def method_page(anchor: Anchor) -> str:
    """The page of one method, as Markdown."""
    needs = "; ".join(NEEDS[n] for n in sorted(anchor.needs)) or "the weights alone"
    if anchor.takes:
        needs += "; where given also " + "; ".join(NEEDS[n] for n in sorted(anchor.takes))
    facts = [
        f"- paper: {paper_link(anchor)}",
        f"- needs: {needs}",
        f"- experts: {expert_range(anchor)}",
        f"- task weights: {_WEIGHTS[anchor.weights]}",
        f"- cost of one (o, i) matrix, T experts: {anchor.cost}",
    ]
    if anchor.matrices:
        mean = "mean of their task vectors" + (", or by what is given besides" if anchor.others else "")
        facts.append(f"- tensors that are no matrices (biases, norms): {mean}")
    parts = [
        f"# {anchor.title} (`{anchor.name}`)",
        anchor.summary,
        "\n".join(facts),
        f"**Formula.** {anchor.formula}",
        f"**When to use it.** {anchor.when}",
    ]
    if anchor.knobs:
        rows = [
            [f"`{k.name}`", str(k.default), knob_range(k), k.help + (" (linear)" if k.linear else "")]
            for k in anchor.knobs
        ]
        parts.append(markdown(["knob", "default", "values", "meaning"], rows))
    parts.append(_usage(anchor))
    return "\n\n".join(parts) + "\n"


def _usage(anchor: Anchor) -> str:
    first = anchor.knobs[0] if anchor.knobs else None
    flag = f" --knob {first.name}={first.default}" if first else ""
    keyword = f', knobs={{"{first.name}": {json.dumps(first.default)}}}' if first else ""
    return "\n".join(
        (
            "```console",
            f"bmm merge --anchor {anchor.name}{flag} --out merged    # alone",
            f"bmm tune --anchor {anchor.name} --budget 50           # as the prior of BMM",
            "```",
            "",
            "```python",
            f'tensors = bmm.merge(anchor="{anchor.name}"{keyword})',
            "```",
        )
    )


def methods_index(anchors: Iterable[Anchor]) -> str:
    """The table of all methods, as Markdown with links to their pages."""
    rows = [
        [
            f"[`{a.name}`]({a.name}.md)",
            a.title,
            ", ".join(sorted(a.needs)) or "-",
            {"": "-", "positive": ">= 0", "any": "any"}[a.weights],
            a.cost,
            paper_link(a),
        ]
        for a in anchors
    ]
    table = markdown(["name", "method", "needs", "task weights", "cost of one (o, i) matrix", "paper"], rows)
    return (
        "# Merge methods\n\n"
        "Each is a plain merge (`bmm merge --anchor NAME`) and a prior for BMM (`bmm tune --anchor NAME`).\n"
        "Any of them takes LiNeS on top, under the name `NAME+lines`.\n"
        "Any merge made elsewhere is a prior too: `--anchor path:FOLDER`.\n"
        "These pages are made of the registry by `bmm anchors --write docs/methods`.\n\n"
        f"{table}\n"
    )


def write_pages(folder: Path) -> list[Path]:
    """Write the index and a page for every registered method into ``folder``, LiNeS by the example of task arithmetic;
    returns their paths."""
    listed = [*ANCHORS.values(), get("task_arithmetic+lines")]
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"README.md": methods_index(listed)} | {f"{a.name}.md": method_page(a) for a in listed}
    for name, text in pages.items():
        (folder / name).write_text(text)
    return [folder / name for name in pages]
