"""Rows of the methods that weigh parameters by statistics of the data."""

from __future__ import annotations

from ..anchor import Anchor, Knob
from ..regmean import regmean
from .common import scale

ROWS = (
    Anchor(
        "regmean",
        "RegMean",
        "2212.09849, Dataless Knowledge Fusion by Merging Weights of Language Models",
        "Least-squares fit to every expert's outputs on its own inputs; mean of what has no Gram.",
        (Knob("off_diagonal", 0.9, 0.0, 1.0, "float", "factor on the off-diagonal entries of the Grams"), scale(1.0)),
        regmean,
        matrices=True,
        needs=frozenset({"grams"}),
        weights="positive",
        formula=(
            "(sum_t a_t W_t G_t) (sum_t a_t G_t)^-1 with G_t = X_t' X_t of the module's inputs, off-diagonals scaled"
        ),
        cost="T o i^2, and one eigendecomposition of (i, i)",
        when="Calibration inputs at hand; BMM adds a prior to it.",
    ),
    Anchor(
        "regmean_pp",
        "RegMean++",
        "2508.03121, RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging",
        "RegMean on the inputs of blocks behind merged blocks; mean of what has no Gram.",
        (Knob("off_diagonal", 0.9, 0.0, 1.0, "float", "factor on the off-diagonal entries of the Grams"), scale(1.0)),
        regmean,
        matrices=True,
        needs=frozenset({"sequential_grams"}),
        weights="positive",
        formula=(
            "(sum_t a_t W_t G_t) (sum_t a_t G_t)^-1 with G_t = X_t' X_t of what reaches the weight in expert t's block "
            "behind the blocks merged before it"
        ),
        cost="T o i^2, one eigendecomposition of (i, i), and a pass over the calibration inputs for every block",
        when="As RegMean, in deep models whose inputs drift once earlier blocks are merged.",
    ),
)
