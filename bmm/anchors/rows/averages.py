"""Rows of the linear methods: averages and sums of task vectors."""

from __future__ import annotations

from ..anchor import Anchor
from ..average import average
from ..greedy_soup import greedy_soup, scan_greedy_soup
from ..task_arithmetic import task_arithmetic
from .common import scale

ROWS = (
    Anchor(
        "average",
        "Average",
        "2203.05482, Model soups",
        "Mean of the experts' weights.",
        (),
        average,
        weights="positive",
        elementwise=True,
        formula="sum_t a_t W_t / sum_t a_t",
        cost="o i T",
        when="Experts of one task from one base (soups), or as the simplest reference.",
    ),
    Anchor(
        "greedy_soup",
        "Greedy soup",
        "2203.05482, Model soups",
        "Average of the experts that raise the validation score, added best first.",
        (),
        greedy_soup,
        needs=frozenset({"score"}),
        scan=scan_greedy_soup,
        weights="positive",
        formula=(
            "sort experts by score; add each to the soup if the soup's score does not fall;"
            " sum_t a_t W_t / sum_t a_t over those in it"
        ),
        cost="o i T, and 2 T - 1 scores of whole models",
        when="Several runs on one task, some of which may be bad; validation data at hand.",
    ),
    Anchor(
        "task_arithmetic",
        "Task arithmetic",
        "2212.04089, Editing Models with Task Arithmetic",
        "Sum of the task vectors, scaled.",
        (scale(0.3),),
        task_arithmetic,
        weights="any",
        elementwise=True,
        formula="W_0 + scale * sum_t a_t (W_t - W_0)",
        cost="o i T",
        when="The first merge to try, and the one for forgetting (negative weight) and analogies.",
    ),
)
