"""Anchors: the merging methods BMM starts from, each usable by itself.

    merged = bmm.anchors.merge("tsv", base, [expert_a, expert_b], scale=1.0)

`ANCHORS` is the table of methods; `merge` and `merge_stream` run one of them over a model. `emr_compress` and
`tall_compress` keep a mask for every task next to the merge, from which `MaskedModels` gives each task its own model.
"""

from __future__ import annotations

from .anchor import Anchor, Context, Knob, matrix_shape
from .compress import emr_compress, tall_compress
from .each import Way, merge_each
from .inputs import Progress
from .masked import MaskedModels
from .registry import ANCHORS, get, resolve_knobs
from .streaming import merge, merge_stream

__all__ = [
    "ANCHORS",
    "Anchor",
    "Context",
    "Knob",
    "MaskedModels",
    "Progress",
    "Way",
    "emr_compress",
    "get",
    "matrix_shape",
    "merge",
    "merge_each",
    "merge_stream",
    "resolve_knobs",
    "tall_compress",
]
