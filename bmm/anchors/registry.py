"""The one table of merging methods: name -> kernel, knobs, needs, paper. Its rows stand in `rows`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import MergeError, did_you_mean
from .anchor import Anchor, KnobValue
from .lines import SUFFIX, with_lines
from .rows import ROWS

ANCHORS: dict[str, Anchor] = {anchor.name: anchor for anchor in ROWS}


def get(name: str) -> Anchor:
    """The method called ``name``, or METHOD+lines for any METHOD (see `lines`).

    Raises `MergeError` with the closest names where there is none.
    """
    if name in ANCHORS:
        return ANCHORS[name]
    inner, plus, wrapper = str(name).partition("+")
    if inner in ANCHORS and wrapper == SUFFIX:
        return with_lines(ANCHORS[inner])
    known = [f"{method}+{SUFFIX}" for method in ANCHORS] if plus else ANCHORS
    hint = f"write METHOD+{SUFFIX}, such as tsv+{SUFFIX}" if name == SUFFIX else did_you_mean(str(name), known)
    raise MergeError(f"no anchor is called {name!r}", hint)


def resolve_knobs(anchor: Anchor, knobs: Mapping[str, Any]) -> dict[str, KnobValue]:
    """Every knob of ``anchor`` with its value: ``knobs`` checked against the bounds, the others at their defaults.

    Raises `MergeError` for a knob the method does not have and for a value it does not take.
    """
    known = {knob.name: knob for knob in anchor.knobs}
    for name in knobs:
        if name not in known:
            hint = did_you_mean(name, known) if known else f"{anchor.name} has no knobs"
            raise MergeError(f"anchor {anchor.name} has no knob {name!r}", hint)
    values = dict(anchor.defaults)
    for name, value in knobs.items():
        try:
            values[name] = known[name].validate(value)
        except MergeError as error:
            raise MergeError(f"anchor {anchor.name}: {error.message}", error.hint) from None
    return values
