"""The search space: which hyperparameters are tuned, between which bounds, and how they map to `Hyperparameters`.

A *point* is ``{parameter name: float}`` in the parameters' own units (log10 for lam); a *unit point* is the same point
scaled to the cube ``[0, 1]^d``, ``d = len(space)``, in the order of the space's parameters. Engines work with unit
points, everybody else with `Hyperparameters`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bmm.errors import RecipeError
from bmm.records import Hyperparameters

Point = dict[str, float]
UnitPoint = NDArray[np.float64]

LOG10_LAM = "log10_lam"
RHO = "rho"
LOG10_LAM_BOUNDS = (-4.0, 3.0)
RHO_BOUNDS = (0.5, 1.5)

GAMMA = "gamma"
ANCHOR_SCALE = "anchor_scale"
LOG10_WEIGHT = "log10_weight"
GAMMA_BOUNDS = (0.0, 1.0)
ANCHOR_SCALE_BOUNDS = (0.0, 2.0)
WEIGHT_FACTOR = 4.0
"""A searched task weight goes from a quarter to four times the one given."""


@dataclass(frozen=True)
class Parameter:
    """One searched number, ``low <= default <= high``, named ``<kind>/<group>`` (``<kind>`` where there is but one)."""

    name: str
    low: float
    high: float
    default: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) for v in (self.low, self.high, self.default)):
            raise RecipeError(f"parameter {self.name!r} has a bound or default that is not a finite number")
        if not self.low < self.high:
            raise RecipeError(
                f"parameter {self.name!r} has the empty range [{self.low}, {self.high}]",
                "give the lower bound first, and a larger upper bound",
            )
        if not self.low <= self.default <= self.high:
            raise RecipeError(f"parameter {self.name!r}: default {self.default} outside [{self.low}, {self.high}]")


@dataclass(frozen=True)
class Space:
    """A box of parameters: for every module group one ``log10_lam/<group>`` and one ``rho/<group>``.

    It may also hold ``gamma``, ``anchor_scale`` and one ``log10_weight/<task>`` a task, see `extended`.

    Raises `RecipeError` where a parameter is repeated, of an unknown kind, or lacks its partner.
    """

    parameters: tuple[Parameter, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(self.parameters))
        names = [p.name for p in self.parameters]
        if not names:
            raise RecipeError("the search space is empty", "choose at least one module group")
        if repeated := sorted({n for n in names if names.count(n) > 1}):
            raise RecipeError(f"the search space names {', '.join(repeated)} more than once")
        wanted = {f"{kind}/{group}" for group in self.groups for kind in (LOG10_LAM, RHO)}
        if wrong := sorted(wanted.symmetric_difference(n for n in names if not _is_extra(n))):
            raise RecipeError(
                f"the search space needs {LOG10_LAM} and {RHO} for every group; at fault: {', '.join(wrong)}"
            )
        for parameter in self.parameters:
            if parameter.name.startswith(f"{RHO}/") and not parameter.low <= 1 <= parameter.high:
                raise RecipeError(
                    f"the range of {parameter.name!r}, [{parameter.low}, {parameter.high}], excludes 1",
                    "rho = 1 is the anchor, which every study starts from: widen the range",
                )

    @classmethod
    def for_groups(
        cls,
        groups: Sequence[str],
        log10_lam: tuple[float, float] = LOG10_LAM_BOUNDS,
        rho: tuple[float, float] = RHO_BOUNDS,
    ) -> Space:
        """One (log10 lam, rho) pair a group. A default (lam = 1) outside the range moves to the nearest bound."""
        parameters = []
        for group in groups:
            if not group:
                raise RecipeError("a module group has an empty name")
            default = min(max(0.0, log10_lam[0]), log10_lam[1])
            parameters.append(Parameter(f"{LOG10_LAM}/{group}", float(log10_lam[0]), float(log10_lam[1]), default))
            parameters.append(Parameter(f"{RHO}/{group}", float(rho[0]), float(rho[1]), min(max(1.0, rho[0]), rho[1])))
        return cls(tuple(parameters))

    def extended(
        self,
        gamma: float | None = None,
        weights: Mapping[str, float] | None = None,
        anchor_scale: float | None = None,
    ) -> Space:
        """This space and a parameter for each value given, which becomes its default.

        ``gamma`` in [0, 1]; ``anchor_scale`` in [0, 2], the factor on the anchor's task vector (0: a prior around the
        base); ``weights`` by task, each on a log scale from a quarter to four times the value. A task of weight 0
        stays out.
        """
        extra = []
        if gamma is not None:
            extra.append(Parameter(GAMMA, *GAMMA_BOUNDS, float(gamma)))
        for task, weight in (weights or {}).items():
            if weight > 0:
                middle, reach = math.log10(weight), math.log10(WEIGHT_FACTOR)
                extra.append(Parameter(f"{LOG10_WEIGHT}/{task}", middle - reach, middle + reach, middle))
        if anchor_scale is not None:
            extra.append(Parameter(ANCHOR_SCALE, *ANCHOR_SCALE_BOUNDS, float(anchor_scale)))
        return Space((*self.parameters, *extra))

    @property
    def groups(self) -> list[str]:
        """Group names in the order they first appear."""
        return list(dict.fromkeys(p.name.partition("/")[2] for p in self.parameters if not _is_extra(p.name)))

    @property
    def tasks(self) -> list[str]:
        """Tasks whose weight is searched."""
        kinds = (p.name.partition("/") for p in self.parameters)
        return [task for kind, _, task in kinds if kind == LOG10_WEIGHT]

    def __len__(self) -> int:
        return len(self.parameters)

    def anchor(self) -> Hyperparameters:
        """The anchor itself: lam = inf, rho = 1, and nothing else changed."""
        return Hyperparameters.uniform(self.groups, math.inf, 1.0)

    def default(self) -> Hyperparameters:
        """Every parameter at its default: lam = 1, rho = 1 unless the bounds exclude it."""
        return self.to_hyperparameters({p.name: p.default for p in self.parameters})

    def to_hyperparameters(self, point: Mapping[str, float]) -> Hyperparameters:
        """``lam = 10 ** log10_lam`` by group. Raises `RecipeError` where the point's names are not the space's."""
        if wrong := sorted({p.name for p in self.parameters}.symmetric_difference(point)):
            raise RecipeError(f"a search point must name exactly the space's parameters; at fault: {', '.join(wrong)}")
        return Hyperparameters(
            lam={g: 10.0 ** point[f"{LOG10_LAM}/{g}"] for g in self.groups},
            rho={g: float(point[f"{RHO}/{g}"]) for g in self.groups},
            gamma=float(point[GAMMA]) if GAMMA in point else None,
            weights={t: 10.0 ** point[f"{LOG10_WEIGHT}/{t}"] for t in self.tasks},
            anchor_scale=float(point[ANCHOR_SCALE]) if ANCHOR_SCALE in point else None,
        )

    def point_of(self, hyperparameters: Hyperparameters) -> Point:
        """The nearest point of the box.

        The anchor (lam = inf) lands on the upper bound of log10 lam, lam = 0 on the lower: lam's effect saturates
        there, so an engine that sees the anchor's score at the bound is not misled. What the hyperparameters leave to
        the recipe (gamma, task weights, the anchor's scale) stands at its default.
        """
        values: Point = {p.name: p.default for p in self.parameters if _is_extra(p.name)}
        given = {GAMMA: hyperparameters.gamma, ANCHOR_SCALE: hyperparameters.anchor_scale}
        given |= {f"{LOG10_WEIGHT}/{t}": math.log10(w) for t, w in hyperparameters.weights.items() if w > 0}
        values |= {name: value for name, value in given.items() if name in values and value is not None}
        for group in self.groups:
            try:
                lam, rho = hyperparameters.lam[group], hyperparameters.rho[group]
            except KeyError:
                raise RecipeError(f"hyperparameters lack the module group {group!r} of the search space") from None
            if not lam >= 0 or not math.isfinite(rho):
                raise RecipeError(f"group {group!r}: lam = {lam}, rho = {rho}; lam must be >= 0 and rho finite")
            values[f"{LOG10_LAM}/{group}"] = math.log10(lam) if lam > 0 else -math.inf
            values[f"{RHO}/{group}"] = rho
        return {p.name: min(max(values[p.name], p.low), p.high) for p in self.parameters}

    def to_unit(self, point: Mapping[str, float]) -> UnitPoint:
        """The point scaled to the unit cube: ``(d,)``."""
        unit = np.array([(point[p.name] - p.low) / (p.high - p.low) for p in self.parameters])  # (d,)
        return np.clip(unit, 0.0, 1.0)

    def from_unit(self, unit: UnitPoint) -> Point:
        """The inverse of `to_unit`, never outside the bounds."""
        return {
            p.name: min(max(p.low + float(u) * (p.high - p.low), p.low), p.high)
            for p, u in zip(self.parameters, unit, strict=True)
        }

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(p) for p in self.parameters]

    @classmethod
    def from_json(cls, raw: Sequence[Mapping[str, Any]]) -> Space:
        return cls(tuple(Parameter(**p) for p in raw))


def _is_extra(name: str) -> bool:
    """Whether a parameter belongs to the whole model or a task rather than to a module group."""
    return name in (GAMMA, ANCHOR_SCALE) or name.startswith(f"{LOG10_WEIGHT}/")
