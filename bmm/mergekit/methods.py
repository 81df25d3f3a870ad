"""mergekit's merge methods: which parameters each takes, and how a tensor is merged by them.

Parameters, defaults and what they do were read from mergekit's documentation and found out by running version 0.1.5;
`benchmarks/crosscheck/mergekit_recipes.py` compares the results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..anchors import ANCHORS, Anchor, Context, Way
from ..anchors.model_stock import model_stock
from ..anchors.sphere import Combination
from ..anchors.thinned import Thinning, thinned
from ..errors import RecipeError
from .values import Scalar

PAPER = "2403.13257, Arcee's MergeKit: A Toolkit for Merging Large Language Models"
NO_EFFECT = ("int8_mask", "eps", "rescale_norm")
"""Parameters that change nothing in the result: how masks are stored, guards of divisions, a name 0.1.5 ignores."""

FLAGS = frozenset({"normalize", "rescale", "filter_wise", "normalize_weights", "nuslerp_flatten", "nuslerp_row_wise"})
"""Parameters that are true or false."""


@dataclass(frozen=True)
class Values:
    """All parameters for one tensor: those of each input, those of the merge, and whether the origin is a base."""

    own: Sequence[Mapping[str, float]]
    whole: Mapping[str, float]
    based: bool
    seed: int

    def each(self, name: str) -> list[float]:
        return [values[name] for values in self.own]


@dataclass(frozen=True)
class Method:
    """One merge method. ``own``: parameters that every input has, ``whole``: those of the merge, each with its default
    or None where it must be given.

    ``base``: "origin" is what task vectors start from, and no input; "either" is so where one is given; "input" makes a
    base one of the inputs, the first. ``inputs``: the fewest and most of them.
    """

    own: Mapping[str, Scalar | None]
    whole: Mapping[str, Scalar | None]
    base: Literal["origin", "either", "input"]
    inputs: tuple[int, int | None]
    way: Callable[[Values], Way]
    random: bool = False

    def check(self, values: Values) -> None:
        """Raise `RecipeError` (without a place) for values this method does not take."""
        for number, own in enumerate(values.own):
            density = own.get("density", 1.0)
            if density < 0 or not 0 <= own.get("gamma", 0.0) <= 1:
                raise RecipeError(f"density {density:g}, gamma {own.get('gamma', 0):g}", "give shares from 0 to 1")
            spread = own.get("epsilon", 0.0)
            if density < 1 and spread and not 0 < density - spread <= density + spread < 1:
                raise RecipeError(
                    f"input {number + 1}: density {density:g} with epsilon {spread:g} leaves 0 to 1",
                    "choose epsilon so that density - epsilon > 0 and density + epsilon < 1",
                )
        if not values.whole.get("nuslerp_flatten", True) or not values.whole.get("normalize_weights", True):
            key = "nuslerp_flatten" if "nuslerp_flatten" in values.whole else "normalize_weights"
            raise RecipeError(f"{key}: false is not supported", "drop it: true is the default")
        if values.whole.get("max_iter", 1) < 0 or values.whole.get("tol", 1) <= 0:
            raise RecipeError("max_iter below 0, or tol not above it", "leave them at 10 and 1e-5")


def _combined(taus: Tensor, context: Context, *, coefficients: Combination) -> Tensor:
    return coefficients.of(taus, context.w0)


def _anchor(name: str, kernel: Callable[..., Tensor], elementwise: bool) -> Anchor:
    summary = f"mergekit's {name}, with values of its own for every tensor and input."
    return Anchor(name, name, PAPER, summary, (), kernel, weights="any", elementwise=elementwise)


def _linear(values: Values) -> Way:
    weights = values.each("weight")
    total = sum(weights)
    if values.whole["normalize"]:
        if abs(total) < 1e-12:
            raise RecipeError(f"the weights {weights} sum to 0", "change them, or set normalize: false")
        weights = [weight / total for weight in weights]
    found = Combination(torch.tensor(weights, dtype=torch.float64), sum(weights) - 1)
    return Way(_anchor("linear", partial(_combined, coefficients=found), True), [1.0] * len(weights))


def _slerp(values: Values) -> Way:
    return _arc(values, values.whole["t"])


def _nuslerp(values: Values) -> Way:
    first, second = values.each("weight")
    return _arc(values, second / (first + second) if first + second else 0.5)


def _arc(values: Values, t: float) -> Way:
    return Way(ANCHORS["slerp"], [1.0, 1.0], {"t": t, "space": _space(values)})


def _space(values: Values) -> str:
    return "task_vectors" if values.based else "weights"


def _multislerp(values: Values) -> Way:
    weights = values.each("weight")
    if sum(weights) <= 0:
        raise RecipeError(f"the weights {weights} have no positive sum", "give positive weights")
    return Way(ANCHORS["multi_slerp"], weights, {"space": _space(values), "tangent": "project"})


def _karcher(values: Values) -> Way:
    knobs = {"space": "weights", "tolerance": values.whole["tol"], "iterations": int(values.whole["max_iter"])}
    return Way(ANCHORS["karcher"], [1.0] * len(values.own), knobs)


def _model_stock(values: Values) -> Way:
    anchor = replace(ANCHORS["model_stock"], kernel=partial(model_stock, beyond=True))
    per = "row" if values.whole["filter_wise"] else "tensor"
    return Way(anchor, [1.0] * len(values.own), {"per": per})


def _sum(
    name: str, rule: Literal["none", "largest", "middle", "random", "ranked"], elect: bool, mean: bool, rescale: bool
) -> Method:
    """A method of the family of task arithmetic: thin out every task vector, then add them up.

    ``mean`` and ``rescale`` are the defaults of its parameters normalize and rescale.
    """
    own: dict[str, Scalar | None] = {"weight": None}
    whole: dict[str, Scalar | None] = {"normalize": mean, "lambda": 1.0}
    if rule != "none":
        own |= {"density": 1.0}
        whole |= {"rescale": rescale}
    own |= {"gamma": 0.01} if rule == "middle" else {"epsilon": 0.15} if rule == "ranked" else {}

    def way(values: Values) -> Way:
        rules = [
            Thinning()
            if rule == "none"
            else Thinning(rule, v["density"], v.get("gamma", 0.0), v.get("epsilon", 0.0), bool(values.whole["rescale"]))
            for v in values.own
        ]
        kernel = partial(thinned, rules=rules, elect=elect, mean=bool(values.whole["normalize"]), seed=values.seed)
        anchor = _anchor(name, kernel, all(r.whole for r in rules))
        return Way(anchor, values.each("weight"), scale=values.whole["lambda"])

    return Method(own, whole, "origin", (1, None), way, rule in ("random", "ranked"))


_WEIGHT: dict[str, Scalar | None] = {"weight": None}

METHODS: dict[str, Method] = {
    "linear": Method(_WEIGHT, {"normalize": True}, "input", (1, None), _linear),
    "slerp": Method({}, {"t": None}, "input", (2, 2), _slerp),
    "nuslerp": Method(_WEIGHT, {"nuslerp_flatten": True, "nuslerp_row_wise": False}, "either", (2, 2), _nuslerp),
    "multislerp": Method(_WEIGHT, {"normalize_weights": True}, "either", (2, None), _multislerp),
    "karcher": Method({}, {"max_iter": 10.0, "tol": 1e-5}, "input", (2, None), _karcher),
    "model_stock": Method({}, {"filter_wise": False}, "origin", (2, None), _model_stock),
    "task_arithmetic": _sum("task_arithmetic", "none", elect=False, mean=False, rescale=False),
    "ties": _sum("ties", "largest", elect=True, mean=True, rescale=False),
    "dare_linear": _sum("dare_linear", "random", elect=False, mean=False, rescale=True),
    "dare_ties": _sum("dare_ties", "random", elect=True, mean=False, rescale=True),
    "breadcrumbs": _sum("breadcrumbs", "middle", elect=False, mean=False, rescale=False),
    "breadcrumbs_ties": _sum("breadcrumbs_ties", "middle", elect=True, mean=False, rescale=False),
    "della": _sum("della", "ranked", elect=True, mean=True, rescale=True),
    "della_linear": _sum("della_linear", "ranked", elect=False, mean=False, rescale=True),
}
"""The methods that are supported, by their names in a recipe."""

KNOWN = frozenset(NO_EFFECT).union(*({*m.own, *m.whole} for m in METHODS.values()), {"select_topk"})
"""Every parameter that some method has; a method ignores those that are not its own."""
