"""From a mergekit recipe to a way of merging every tensor: who is the base, which value holds where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..anchors import Way
from ..errors import RecipeError, did_you_mean
from ..groups import depth_of, relative_depths
from .config import Level, MergekitConfig, Source
from .methods import FLAGS, KNOWN, METHODS, NO_EFFECT, Method, Values
from .values import Scalar, evaluate


@dataclass(frozen=True)
class Plan:
    """A recipe with its roles: ``origin`` is what task vectors start from, "" where the first input takes its place;
    ``inputs`` are merged, in this order."""

    config: MergekitConfig
    method: Method
    origin: str
    inputs: tuple[Source, ...]
    notices: tuple[str, ...]

    @classmethod
    def of(cls, config: MergekitConfig) -> Plan:
        """The roles of the models; raises `RecipeError` naming the key of what is not supported or missing."""
        where = config.where
        if config.method not in METHODS:
            raise RecipeError(
                f"{where}: merge_method: {config.method!r} is not supported", did_you_mean(config.method, METHODS)
            )
        method = METHODS[config.method]
        if not config.base and (method.base == "origin" or config.method == "slerp"):
            raise RecipeError(f"{where}: base_model: {config.method} needs one", "name the models' common base")
        inputs = [source for source in config.sources if source.model != config.base]
        if config.base and method.base == "input":
            listed = [source for source in config.sources if source.model == config.base]
            inputs = [*(listed or [Source(config.base, "base_model", ())]), *inputs]
        fewest, most = method.inputs
        if not fewest <= len(inputs) <= (most or len(inputs)):
            limit = f"exactly {fewest}" if most == fewest else f"at least {fewest}"
            key = "models" if not config.layers else "slices[0].sources"
            raise RecipeError(
                f"{where}: {key}: {config.method} merges {limit}, not {len(inputs)}", "the base aside, where it has one"
            )
        origin = config.base if method.base != "input" else ""
        plan = cls(config, method, origin, tuple(inputs), ())
        return cls(config, method, origin, tuple(inputs), tuple(plan._look_at_parameters()))

    def _look_at_parameters(self) -> Iterator[str]:
        """What has no effect; `RecipeError` for parameters that no method has."""
        merged = {source.path for source in self.inputs}
        levels = [(level, {*self.method.own, *self.method.whole}) for level in self.config.shared]
        for source in self.config.sources:
            taken = set(self.method.own) if source.path in merged else set()
            levels += [(level, taken) for level in source.levels if level not in self.config.shared]
        for level, taken in levels:
            for name in level.settings:
                if name not in KNOWN:
                    raise RecipeError(
                        f"{self.config.where}: {level.path}.{name}: no such parameter", did_you_mean(name, KNOWN)
                    )
                if name not in taken:
                    why = "changes nothing" if name in NO_EFFECT else f"is no parameter of {self.config.method} there"
                    yield f"{level.path}.{name} {why}: ignored, as mergekit does"
        if self.method.random:
            yield f"{self.config.method} drops entries at random: with mergekit's distribution, but another seed"

    def ways(self, names: Iterable[str], spoken: Mapping[str, str], seed: int) -> dict[str, Way]:
        """The way of merging each tensor. ``spoken``: the name that filters see, where it is another.

        Raises `RecipeError` for a parameter that some tensor lacks, and for values the method does not take.
        """
        names = list(names)
        depths, places = relative_depths(names), {depth_of(name) for name in names} - {None}
        found = {}
        for name in names:
            inside = depth_of(name) is not None and len(places) > 1
            shown, depth = spoken.get(name, name), depths[name] if inside else 0.0
            values = Values(
                [
                    {p: self._value(p, d, (*s.levels, *self.config.shared), shown, depth, s.path) for p, d in own}
                    for s in self.inputs
                    for own in [self.method.own.items()]
                ],
                {p: self._value(p, d, self.config.shared, shown, depth, "") for p, d in self.method.whole.items()},
                bool(self.origin),
                seed,
            )
            try:
                self.method.check(values)
                found[name] = self.method.way(values)
            except RecipeError as error:
                raise RecipeError(f"{self.config.where}: {name}: {error.message}", error.hint) from None
        return found

    def _value(
        self, name: str, default: Scalar | None, levels: tuple[Level, ...], tensor: str, depth: float, path: str
    ) -> float:
        """The value of a parameter for one tensor: the first level that has one for it."""
        for level in levels:
            if name in level.settings:
                value = evaluate(level.settings[name], tensor, depth)
                if value is not None:
                    return self._checked(name, value, f"{level.path}.{name}")
        if default is None:
            place = f"{path}.parameters.{name}" if path and path != "base_model" else f"parameters.{name}"
            raise RecipeError(
                f"{self.config.where}: {place}: {self.config.method} needs a {name} for {tensor}",
                "give it there, or for all under parameters; a list of filters ends with one that has only a value",
            )
        return default

    def _checked(self, name: str, value: Scalar, path: str) -> float:
        if name in FLAGS:
            if value in (0, 1):
                return bool(value)
        elif not isinstance(value, bool):
            return float(value)
        kind = "true or false" if name in FLAGS else "a number"
        raise RecipeError(f"{self.config.where}: {path}: {value!r} does not fit", f"{name} is {kind}")
