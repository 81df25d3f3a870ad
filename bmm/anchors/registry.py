"""The one table of merging methods: name -> kernel, knobs, needs, paper. A new one is a kernel file and a row here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import MergeError, did_you_mean
from .anchor import Anchor, Knob, KnobValue
from .average import average
from .dare import dare_ta, dare_ties, scan_dare_ties
from .iso import iso_c, iso_cts
from .regmean import regmean
from .task_arithmetic import task_arithmetic
from .ties import scan_ties, ties
from .tsv import tsv
from .wudi import wudi, wudi_exact


def _scale(default: float) -> Knob:
    return Knob("scale", default, 0.0, 2.0, "float", "factor on the merged task vector", linear=True)


_DENSITY = Knob("density", 0.2, 0.001, 1.0, "float", "share of all parameters each task vector keeps, by magnitude")
_REDUCE = Knob(
    "reduce", "mean", None, None, "choice", "mean or sum of the entries that agree in sign", choices=("mean", "sum")
)
_DROP = Knob("drop", 0.9, 0.0, 0.99, "float", "probability of dropping an entry")
_SEED = Knob("seed", 0, 0, 2**31 - 1, "int", "seed of the random masks")

_DARE_PAPER = "2311.03099, Language Models are Super Mario"
_ISO_PAPER = "2502.04959, No Task Left Behind: Isotropic Model Merging"
_WUDI_PAPER = "2503.08099, Whoever Started the Interference Should End It"

_ROWS = (
    Anchor(
        "average",
        "Average",
        "2203.05482, Model soups",
        "Mean of the experts' weights.",
        (),
        average,
    ),
    Anchor(
        "task_arithmetic",
        "Task arithmetic",
        "2212.04089, Editing Models with Task Arithmetic",
        "Sum of the task vectors, scaled.",
        (_scale(0.3),),
        task_arithmetic,
    ),
    Anchor(
        "ties",
        "TIES",
        "2306.01708, TIES-Merging: Resolving Interference When Merging Models",
        "Trim task vectors to their largest entries, elect a sign per coordinate, merge what agrees.",
        (_DENSITY, _REDUCE, _scale(1.0)),
        ties,
        scan=scan_ties,
    ),
    Anchor(
        "dare_ta",
        "DARE + task arithmetic",
        _DARE_PAPER,
        "Drop entries of the task vectors at random, rescale the rest, sum.",
        (_DROP, _SEED, _scale(0.3)),
        dare_ta,
    ),
    Anchor(
        "dare_ties",
        "DARE + TIES",
        _DARE_PAPER,
        "Drop entries of the task vectors at random, rescale the rest, merge by TIES.",
        (_DROP, _SEED, _DENSITY, _REDUCE, _scale(1.0)),
        dare_ties,
        scan=scan_dare_ties,
    ),
    Anchor(
        "tsv",
        "TSV-M",
        "2412.00081, Task Singular Vectors: Reducing Task Interference in Model Merging",
        "Leading singular directions of every task, whitened against each other; mean of what is no matrix.",
        (_scale(1.0),),
        tsv,
        matrices=True,
    ),
    Anchor(
        "iso_c",
        "Iso-C",
        _ISO_PAPER,
        "Sum of the task vectors with all singular values set to their mean; mean of what is no matrix.",
        (_scale(1.0),),
        iso_c,
        matrices=True,
    ),
    Anchor(
        "iso_cts",
        "Iso-CTS",
        _ISO_PAPER,
        "Common directions of the sum and each task's own, under one singular value; mean of what is no matrix.",
        (
            Knob("common_share", 0.8, 0.0, 1.0, "float", "share of the directions that the sum of the tasks provides"),
            _scale(1.0),
        ),
        iso_cts,
        matrices=True,
    ),
    Anchor(
        "wudi",
        "WUDI",
        _WUDI_PAPER,
        "Adam on the tasks' interference from the sum of the task vectors; mean of what is no matrix.",
        (
            Knob("steps", 300, 0, 100_000, "int", "Adam steps"),
            Knob("rate", 1e-5, 1e-8, 0.1, "float", "Adam's learning rate, in units of a weight"),
            _scale(1.0),
        ),
        wudi,
        matrices=True,
    ),
    Anchor(
        "wudi_exact",
        "WUDI, solved exactly",
        _WUDI_PAPER,
        "Minimum of the tasks' interference, in closed form; mean of what is no matrix.",
        (
            Knob("ridge", 1e-6, 0.0, 1.0, "float", "pull towards the start, relative to the largest eigenvalue"),
            Knob("towards", "sum", None, None, "choice", "the start: mean or sum of the task vectors", ("mean", "sum")),
            _scale(1.0),
        ),
        wudi_exact,
        matrices=True,
    ),
    Anchor(
        "regmean",
        "RegMean",
        "2212.09849, Dataless Knowledge Fusion by Merging Weights of Language Models",
        "Least-squares fit to every expert's outputs on its own inputs; mean of what has no Gram.",
        (Knob("off_diagonal", 0.9, 0.0, 1.0, "float", "factor on the off-diagonal entries of the Grams"), _scale(1.0)),
        regmean,
        matrices=True,
        needs=frozenset({"grams"}),
    ),
)

ANCHORS: dict[str, Anchor] = {anchor.name: anchor for anchor in _ROWS}


def get(name: str) -> Anchor:
    """The method called ``name``; raises `MergeError` with the closest names where there is none."""
    if name in ANCHORS:
        return ANCHORS[name]
    raise MergeError(f"no anchor is called {name!r}", did_you_mean(str(name), ANCHORS))


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
