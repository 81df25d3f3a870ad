"""Rows of the methods that follow the geometry of weight space: angles, spheres, depth."""

from __future__ import annotations

from ..anchor import Anchor, Knob
from ..model_stock import model_stock
from ..slerp import karcher, measure_karcher, measure_multi_slerp, measure_slerp, multi_slerp, slerp

_MERGEKIT = "2403.13257, Arcee's MergeKit: A Toolkit for Merging Large Language Models"
_SPACE = Knob.choice(
    "space",
    ("weights", "task_vectors"),
    "interpolate the weights (angles seen from 0) or their changes (angles seen from the base)",
)

ROWS = (
    Anchor(
        "model_stock",
        "Model Stock",
        "2403.19522, Model Stock: All we need is just a few fine-tuned models",
        "Between the base and the experts' mean, as near to the base as the angle between task vectors asks.",
        (
            Knob.choice(
                "per", ("tensor", "row"), "what has an angle of its own: a tensor (published) or each output row"
            ),
        ),
        model_stock,
        formula="W_0 + t mean(tau_t), t = T cos / (1 + (T - 1) cos), cos the mean pairwise cosine of the task vectors",
        cost="o i T^2",
        when="Two or more runs on one task from one base (soups), without data.",
    ),
    Anchor(
        "slerp",
        "SLERP",
        _MERGEKIT,
        "Along the great circle between two experts, tensor by tensor.",
        (Knob("t", 0.5, 0.0, 1.0, "float", "place on the arc: 0 is the first expert, 1 the second"), _SPACE),
        slerp,
        elementwise=True,
        measure=measure_slerp,
        experts=(2, 2),
        formula="sin((1 - t) phi) / sin(phi) W_1 + sin(t phi) / sin(phi) W_2, phi their angle; a line if parallel",
        cost="o i",
        when="Exactly two experts, as is common for language models; multi_slerp and karcher take more.",
    ),
    Anchor(
        "multi_slerp",
        "Multi-SLERP",
        _MERGEKIT,
        "Weighted mean of the experts' directions and of their lengths, tensor by tensor.",
        (
            _SPACE,
            Knob.choice(
                "tangent", ("project", "log"), "map into the tangent space: projection (published) or logarithm"
            ),
        ),
        multi_slerp,
        elementwise=True,
        measure=measure_multi_slerp,
        weights="positive",
        formula="exp_m(sum_t a_t P_m(W_t / |W_t|)) * sum_t a_t |W_t|, m = normalised sum_t a_t W_t / |W_t|, sum a = 1",
        cost="o i T^2",
        when="SLERP for more than two experts.",
    ),
    Anchor(
        "karcher",
        "Karcher mean",
        _MERGEKIT,
        "Riemannian mean of the experts' directions, and the mean of their lengths, tensor by tensor.",
        (
            _SPACE,
            Knob("tolerance", 1e-7, 1e-12, 1.0, "float", "step in radians at which the mean has converged"),
            Knob("iterations", 10, 0, 1000, "int", "most tangent steps"),
        ),
        karcher,
        elementwise=True,
        measure=measure_karcher,
        weights="positive",
        formula="argmin_m sum_t a_t angle(m, W_t)^2 on the unit sphere, times sum_t a_t |W_t| / sum_t a_t",
        cost="o i T^2",
        when="As multi_slerp, where experts are far apart; the exact mean on the sphere.",
    ),
)
