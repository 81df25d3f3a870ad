"""Rows of the methods that weigh parameters by statistics of the data."""

from __future__ import annotations

from ..anchor import Anchor, Knob
from ..fisher import FLOOR, fisher, scan_fisher
from ..gradient_matching import gradient_matching
from ..mats import mats, without_gram
from ..regmean import regmean
from .common import scale

ROWS = (
    Anchor(
        "regmean",
        "RegMean",
        "2212.09849, Dataless Knowledge Fusion by Merging Weights of Language Models",
        "Least-squares fit to every expert's outputs on its own inputs; mean of what has no Gram.",
        (
            Knob(
                "off_diagonal",
                0.9,
                0.0,
                1.0,
                "float",
                "factor on the off-diagonal entries of the Grams: 0.9 in the paper, 0.95 in newer code",
            ),
            scale(1.0),
        ),
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
        "mats",
        "MaTS",
        "2312.04339, Merging by Matching Models in Task Parameter Subspaces",
        "RegMean's linear system by conjugate gradients from a plain merge; mean, or Fisher mean, of what has no Gram.",
        (
            Knob.choice("start", ("mean", "sum", "base"), "where the iteration starts: a plain merge, or the base"),
            Knob("iterations", 100, 0, 100_000, "int", "most iterations; few stay close to the start"),
            Knob("tolerance", 1e-6, 0.0, 1.0, "float", "relative residual that is good enough"),
            Knob("off_diagonal", 1.0, 0.0, 1.0, "float", "factor on the off-diagonal entries of the Grams"),
            scale(1.0),
        ),
        mats,
        matrices=True,
        needs=frozenset({"grams"}),
        takes=frozenset({"fisher"}),
        others=without_gram,
        weights="positive",
        formula="W with sum_t a_t W G_t = sum_t a_t W_t G_t, G_t the Gram of the module's inputs, from `start`",
        cost="T o i^2, then o i^2 an iteration",
        when="As RegMean, where a stop between a plain merge and the least-squares fit is better than either.",
    ),
    Anchor(
        "fisher",
        "Fisher merging",
        "2111.09832, Merging Models with Fisher-Weighted Averaging",
        "Average of the experts, every parameter weighted by its diagonal Fisher.",
        (
            Knob.choice("normalise", ("norm", "none"), "divide each Fisher by its norm over the model, or do not"),
            Knob("floor", FLOOR, 0.0, 1.0, "float", "smallest Fisher; where all are below, the mean"),
            scale(1.0),
        ),
        fisher,
        needs=frozenset({"fisher"}),
        scan=scan_fisher,
        weights="positive",
        formula="sum_t a_t F_t W_t / sum_t a_t F_t, elementwise, F_t the mean of squared per-example gradients",
        cost="o i T, and a gradient an example for the Fishers",
        when="Calibration inputs at hand and parameters of every kind to merge, not only matrices.",
    ),
    Anchor(
        "gradient_matching",
        "Uncertainty-based gradient matching",
        "2310.12808, Model Merging by Uncertainty-Based Gradient Matching",
        "Task arithmetic, every parameter corrected by the Fishers of base and experts.",
        (
            Knob("coefficient", 0.3, 0.0, 10.0, "float", "factor on all task weights, the paper's alpha"),
            Knob("prior", 1e-8, 0.0, 1e6, "float", "precision added to the base's Fisher"),
            scale(1.0),
        ),
        gradient_matching,
        needs=frozenset({"fisher", "base_fisher"}),
        weights="positive",
        formula=(
            "W_0 + (H_0 + sum_t a_t F_t)^-1 sum_t a_t (H_0 + F_t) tau_t, elementwise, H_0 = F_0 + prior, with"
            " coefficient * a_t for a_t"
        ),
        cost="o i T, and a gradient an example for the Fishers",
        when="Where both task arithmetic and Fisher merging are sensible: it stands between the two.",
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
