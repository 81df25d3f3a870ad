"""Rows of the methods that decide entry by entry: trim, drop, mask, elect."""

from __future__ import annotations

from ..anchor import Anchor
from ..dare import dare_ta, dare_ties, scan_dare_ties
from ..ties import scan_ties, ties
from .common import DENSITY, DROP, REDUCE, SEED, scale

_DARE_PAPER = "2311.03099, Language Models are Super Mario"

ROWS = (
    Anchor(
        "ties",
        "TIES",
        "2306.01708, TIES-Merging: Resolving Interference When Merging Models",
        "Trim task vectors to their largest entries, elect a sign per coordinate, merge what agrees.",
        (DENSITY, REDUCE, scale(1.0)),
        ties,
        scan=scan_ties,
        weights="any",
        elementwise=True,
        formula=(
            "keep the largest `density` of each task vector over the whole model; elect the sign of their sum per"
            " coordinate; mean (or sum) of the entries with that sign"
        ),
        cost="o i T, in four passes over the experts' files",
        when="Elementwise interference: many experts whose updates disagree in sign.",
    ),
    Anchor(
        "dare_ta",
        "DARE + task arithmetic",
        _DARE_PAPER,
        "Drop entries of the task vectors at random, rescale the rest, sum.",
        (DROP, SEED, scale(0.3)),
        dare_ta,
        weights="any",
        elementwise=True,
        formula="zero each entry of tau_t with probability `drop`, divide the rest by 1 - drop, sum",
        cost="o i T",
        when="Language models with small, redundant updates; less for strongly fine-tuned experts.",
    ),
    Anchor(
        "dare_ties",
        "DARE + TIES",
        _DARE_PAPER,
        "Drop entries of the task vectors at random, rescale the rest, merge by TIES.",
        (DROP, SEED, DENSITY, REDUCE, scale(1.0)),
        dare_ties,
        scan=scan_dare_ties,
        weights="any",
        elementwise=True,
        formula="zero each entry of tau_t with probability `drop`, divide the rest by 1 - drop, then TIES",
        cost="o i T, in four passes over the experts' files",
        when="As DARE, where signs disagree.",
    ),
)
