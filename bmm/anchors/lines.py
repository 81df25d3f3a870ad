"""LiNeS: any merge, with a factor on its task vector that rises linearly with depth (arXiv 2410.17146).

``METHOD+lines`` is a method like any other: METHOD's knobs, and those below. A parameter at depth x in [0, 1] gets

    W = W_0 + scale * (alpha + beta * x) * d

where d is METHOD's merged task vector. Shallow layers, which carry what all tasks share, stay near the base.
As published for several tasks, alpha is no free knob: ``alpha = ||sum_t tau_t||_1 / (T ||d||_1)`` over the whole model
makes the first layer as strong as in the plain average of the experts, and beta takes the place of METHOD's scale.
``lines_alpha`` is therefore a multiple of that number (``lines_unit`` "norm", one more pass over the experts, in which
METHOD runs once), or the factor itself ("one"; a single expert with alpha + beta = 1 is the paper's single-task edit).

The paper counts blocks and gives alpha to whatever lies outside them, before or after. Here what follows the last
block counts as depth 1, unless ``lines_outside`` is "first".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .anchor import Anchor, Knob, KnobValue, weighted_sum

SUFFIX = "lines"
PAPER = "2410.17146, LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging"


def with_lines(anchor: Anchor) -> Anchor:
    """The method ``anchor`` under LiNeS, called NAME+lines; its scale starts at 1 and its default passes to beta."""
    beta = float(anchor.linear.default) if anchor.linear else 1.0
    knobs = tuple(replace(knob, default=1.0) if knob.linear else knob for knob in anchor.knobs)
    return replace(
        anchor,
        name=f"{anchor.name}+{SUFFIX}",
        title=f"{anchor.title} with LiNeS",
        paper=PAPER,
        summary=f"{anchor.summary} Then scaled by a factor that rises linearly with depth.",
        knobs=(*knobs, *_knobs(beta)),
        wrapped=anchor,
        formula=f"(lines_alpha * unit + lines_beta * depth) times [{anchor.formula}]",
        cost=f"twice [{anchor.cost}], once with lines_unit one",
        when=f"{anchor.when} With LiNeS: where merging hurts what shallow layers share, or forgets the base.",
    )


def _knobs(beta: float) -> tuple[Knob, ...]:
    return (
        Knob("lines_alpha", 1.0, 0.0, 10.0, "float", "factor on the first layer, in lines_unit"),
        Knob("lines_beta", beta, 0.0, 10.0, "float", "what the factor gains from the first to the last layer"),
        Knob.choice(
            "lines_unit",
            ("norm", "one"),
            "norm: length of the sum of task vectors over T times that of the merge, as published; one: 1",
        ),
        Knob.choice(
            "lines_outside",
            ("depth", "first"),
            "parameters outside the blocks: by their depth, or as the first layer (published)",
        ),
    )


@dataclass(frozen=True)
class Profile:
    """The factor by depth: ``alpha + beta * depth``; ``outside_first`` gives alpha to what has no block."""

    alpha: float
    beta: float
    outside_first: bool

    def factor(self, depth: float, in_block: bool) -> float:
        return self.alpha if self.outside_first and not in_block else self.alpha + self.beta * depth


Merges = Iterable[tuple[Tensor, Tensor]]
"""(taus (T, *shape), d (*shape)) of every floating tensor that is not empty, or of its pieces: the task vectors, and
what the wrapped method makes of them without its scale. It is iterated where the profile needs it, once."""


def profile(knobs: Mapping[str, KnobValue], merges: Merges, weights: Tensor) -> Profile:
    """The profile of one merge."""
    unit = _norm_ratio(merges, weights) if knobs["lines_unit"] == "norm" else 1.0
    return Profile(float(knobs["lines_alpha"]) * unit, float(knobs["lines_beta"]), knobs["lines_outside"] == "first")


def _norm_ratio(merges: Merges, weights: Tensor) -> float:
    """``||sum_t a_t tau_t||_1 / (sum_t |a_t| ||d||_1)`` over the whole model; 1 where d is zero.

    The norms are the authors' (their code); the paper does not name one.
    """
    total = size = 0.0
    for taus, d in merges:
        total += float(weighted_sum(taus, weights).abs().sum(dtype=torch.float64))
        size += float(d.abs().sum(dtype=torch.float64))
    return total / (float(weights.abs().sum()) * size) if size else 1.0
