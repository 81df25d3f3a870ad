"""Rows of the methods that decide entry by entry: trim, drop, mask, elect."""

from __future__ import annotations

from ..anchor import Anchor, Knob
from ..breadcrumbs import breadcrumbs
from ..consensus import consensus_ta
from ..dare import dare_ta, dare_ties, scan_dare_ties
from ..della import della
from ..emr import emr
from ..magmax import magmax
from ..pcb import pcb, scan_pcb
from ..ties import scan_ties, ties
from .common import DENSITY, DROP, REDUCE, SEED, fuse, scale

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
    Anchor(
        "breadcrumbs",
        "Breadcrumbs",
        "2312.06795, Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
        "Mask the smallest and the largest entries of every tensor's task vectors, sum the rest.",
        (
            Knob("beta", 0.85, 0.0, 0.99, "float", "share of a tensor's entries dropped as negligible"),
            Knob(
                "gamma", 0.993, 0.9, 1.0, "float", "share of a tensor's entries that are no outliers; beyond it, drop"
            ),
            fuse("sum"),
            scale(0.3),
        ),
        breadcrumbs,
        weights="any",
        formula="keep the entries of tau_t whose magnitude ranks between beta n and gamma n in their tensor; sum",
        cost="o i T",
        when="Many experts, and no validation data to tune each newcomer: outliers are what makes sums explode.",
    ),
    Anchor(
        "della",
        "DELLA",
        "2406.11617, DELLA-Merging: Reducing Interference through Magnitude-Based Sampling",
        "Drop entries at random, small ones likelier; rescale the rest, elect a sign, merge what agrees.",
        (
            Knob("drop", 0.5, 0.0, 0.99, "float", "mean probability of dropping an entry"),
            Knob(
                "epsilon", 0.2, 0.0, 1.0, "float", "spread of that probability, from the largest entry to the smallest"
            ),
            Knob.choice("ranking", ("row", "tensor"), "rank magnitudes in rows or whole tensors"),
            fuse("agree_mean"),
            SEED,
            scale(0.5),
        ),
        della,
        weights="any",
        formula=(
            "zero entry i of tau_t with probability p_i = drop - epsilon / 2 + epsilon rank_i / (n - 1), rank 0 the"
            " largest; divide the rest by 1 - p_i; mean of the entries that agree with the sign of their sum"
        ),
        cost="o i T log i",
        when="As DARE, where large entries matter; language models with small, redundant updates.",
    ),
    Anchor(
        "magmax",
        "MagMax",
        "2407.06322, MagMax: Leveraging Model Merging for Seamless Continual Learning",
        "Of every coordinate, the task vectors' entry of largest magnitude.",
        (scale(0.5),),
        magmax,
        weights="any",
        formula="scale * (a_t tau_t with the largest magnitude, per coordinate)",
        cost="o i T",
        when="Experts trained one after the other, each from the last (continual learning).",
    ),
    Anchor(
        "consensus_ta",
        "Consensus task arithmetic",
        "2405.07813, Localizing Task Information for Improved Model Merging and Compression",
        "Sum of the task vectors, without the coordinates that fewer than k tasks use.",
        (
            Knob("mask_strength", 0.4, 0.0, 1.0, "float", "lambda: how far a task's own entry must stand out"),
            Knob("agree", 2, 0, 64, "int", "k: tasks that must use a coordinate, at most the number of experts"),
            scale(0.3),
        ),
        consensus_ta,
        weights="any",
        formula="scale * sum_t tau_t where |tau_t| >= mask_strength |sum_s tau_s - tau_t| for at least `agree` tasks t",
        cost="o i T",
        when="Many tasks of unlike kind: what serves one of them alone harms the others.",
    ),
    Anchor(
        "pcb",
        "PCB",
        "2410.02396, Parameter Competition Balancing for Model Merging",
        "Score every entry within its task and against the others, drop low scores, average by score.",
        (
            Knob.choice("balance", ("code", "paper"), "scores as the released code or as the paper defines them"),
            Knob("ratio", 0.1, 0.01, 1.0, "float", "share of all parameters each task vector keeps, by score"),
            scale(1.0),
        ),
        pcb,
        scan=scan_pcb,
        weights="any",
        formula=(
            "sum_t b_t tau_t / sum_t b_t; b_t from exp(T norm(|tau_t|)^2) tanh(tau_t sum_s tau_s), 0 below the `ratio`"
            " largest of the whole model"
        ),
        cost="o i T (paper: o i T^2), in five passes over the experts' files",
        when="As TIES, where a task's few strongest entries should win a coordinate.",
    ),
    Anchor(
        "emr",
        "EMR (unified)",
        "2405.17461, EMR-Merging: Tuning-Free High-Performance Model Merging",
        "Elect a sign per coordinate, take the largest entry that has it.",
        (scale(1.0),),
        emr,
        weights="any",
        formula="sign(sum_t a_t tau_t) * max of |a_t tau_t| over the tasks with that sign, per coordinate",
        cost="o i T",
        when=(
            "With masks (bmm merge --masks), near-expert scores for one model more and a bit a parameter and task; by"
            " itself the largest entries overshoot, and a scale near 0.5 does better."
        ),
    ),
)
