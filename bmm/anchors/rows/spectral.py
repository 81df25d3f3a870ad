"""Rows of the methods that decide by singular directions of the task vectors."""

from __future__ import annotations

from ..anchor import Anchor, Knob
from ..iso import iso_c, iso_cts
from ..tsv import tsv
from ..wudi import wudi, wudi_exact
from .common import scale

_ISO_PAPER = "2502.04959, No Task Left Behind: Isotropic Model Merging"
_WUDI_PAPER = "2503.08099, Whoever Started the Interference Should End It"

ROWS = (
    Anchor(
        "tsv",
        "TSV-M",
        "2412.00081, Task Singular Vectors: Reducing Task Interference in Model Merging",
        "Leading singular directions of every task, whitened against each other; mean of what is no matrix.",
        (scale(1.0),),
        tsv,
        matrices=True,
        weights="any",
        formula=(
            "SVD of every a_t tau_t, its min(o, i) / T leading triples side by side, left and right vectors "
            "replaced by their nearest orthonormal sets"
        ),
        cost="T + 2 singular value decompositions of (o, i)",
        when="The strongest data-free start for vision transformers here; the default anchor.",
    ),
    Anchor(
        "iso_c",
        "Iso-C",
        _ISO_PAPER,
        "Sum of the task vectors with all singular values set to their mean; mean of what is no matrix.",
        (scale(1.0),),
        iso_c,
        matrices=True,
        weights="any",
        formula="SVD of sum_t a_t tau_t, every singular value replaced by their mean",
        cost="one singular value decomposition of (o, i)",
        when="Many tasks that share directions; cheaper than TSV-M.",
    ),
    Anchor(
        "iso_cts",
        "Iso-CTS",
        _ISO_PAPER,
        "Common directions of the sum and each task's own, under one singular value; mean of what is no matrix.",
        (
            Knob("common_share", 0.8, 0.0, 1.0, "float", "share of the directions that the sum of the tasks provides"),
            scale(1.0),
        ),
        iso_cts,
        matrices=True,
        weights="any",
        formula=(
            "leading directions of sum_t a_t tau_t, and for each task the leading ones of its task vector off "
            "them, under one singular value"
        ),
        cost="T + 3 singular value decompositions of (o, i)",
        when="As Iso-C with many or dissimilar tasks.",
    ),
    Anchor(
        "wudi",
        "WUDI",
        _WUDI_PAPER,
        "Adam on the tasks' interference from the sum of the task vectors; mean of what is no matrix.",
        (
            Knob("steps", 300, 0, 100_000, "int", "Adam steps"),
            Knob("rate", 1e-5, 1e-8, 0.1, "float", "Adam's learning rate, in units of a weight"),
            scale(1.0),
        ),
        wudi,
        matrices=True,
        weights="positive",
        formula="`steps` of Adam on sum_t a_t ||(d - tau_t) tau_t'||^2 / ||tau_t||^2 from sum_t a_t tau_t",
        cost="T i^2 o, then `steps` products of o i^2",
        when="To reproduce the paper; wudi_exact reaches the minimum it walks towards.",
    ),
    Anchor(
        "wudi_exact",
        "WUDI, solved exactly",
        _WUDI_PAPER,
        "Minimum of the tasks' interference, in closed form; mean of what is no matrix.",
        (
            Knob("ridge", 1e-2, 0.0, 1.0, "float", "pull towards the start, relative to the largest eigenvalue"),
            Knob.choice("towards", ("mean", "sum"), "the start: mean or sum of the task vectors", "sum"),
            scale(1.0),
        ),
        wudi_exact,
        matrices=True,
        weights="positive",
        formula=(
            "(sum_t a_t tau_t G_t) (sum_t a_t G_t)^-1 with G_t = tau_t' tau_t / ||tau_t||^2, by a ridge towards "
            "the sum or mean"
        ),
        cost="T i^2 o, and one eigendecomposition of (i, i)",
        when="As WUDI, in closed form; a good anchor for BMM with data.",
    ),
)
