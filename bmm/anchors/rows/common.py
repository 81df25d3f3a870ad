"""Knobs that several methods share."""

from __future__ import annotations

from ..anchor import Knob

DENSITY = Knob("density", 0.2, 0.001, 1.0, "float", "share of all parameters each task vector keeps, by magnitude")
REDUCE = Knob.choice("reduce", ("mean", "sum"), "mean or sum of the entries that agree in sign")
DROP = Knob("drop", 0.9, 0.0, 0.99, "float", "probability of dropping an entry")
SEED = Knob("seed", 0, 0, 2**31 - 1, "int", "seed of the random masks")


def fuse(default: str) -> Knob:
    """How thinned-out task vectors join."""
    return Knob.choice(
        "fuse",
        ("sum", "agree_sum", "agree_mean"),
        "sum of all entries, or sum or mean of those that agree in sign",
        default,
    )


def scale(default: float) -> Knob:
    """A factor on the whole merged task vector."""
    return Knob("scale", default, 0.0, 2.0, "float", "factor on the merged task vector", linear=True)
