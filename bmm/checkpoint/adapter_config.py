"""adapter_config.json: what a PEFT adapter says about itself, and which of it can be merged exactly.

LoRA: arXiv 2106.09685; rsLoRA (alpha / sqrt(r)): arXiv 2312.03732; DoRA: arXiv 2402.09353.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .formats import read_json, reason, some
from .layout import inside

CONFIG = "adapter_config.json"
WITHOUT_EFFECT = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type", "eva_config", "corda_config",
    "lora_ga_config", "loftq_config",
})  # fmt: skip
"""Keys that do not change what a trained adapter computes; the last four are of an initialisation, see `KEEPS_BASE`."""
READ = frozenset({
    "alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save", "r", "rank_pattern",
    "target_modules", "trainable_token_indices", "use_dora", "use_rslora",
})  # fmt: skip
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave W0 alone; pissa, olora, corda, loftq ... subtract from it, so that B A stands
on other weights than the base's."""
MERGE_WITH_PEFT = "merge it into its base with peft (merge_and_unload) and give the full model"


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA adapter's settings, checked; modules are named as peft names them, without ``base_model.model.``."""

    path: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dora: bool
    bias: str
    lora_bias: bool
    fan_in_fan_out: bool
    targets: tuple[str, ...] | str | None
    exclude: tuple[str, ...] | str
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]] | tuple[int, ...] | None
    ties: bool
    base: str

    def rank_of(self, module: str) -> int:
        """The rank of a module: of the first pattern that matches the end of its name, else ``r``."""
        return int(self.rank_pattern.get(_pattern_of(self.rank_pattern, module), self.rank))

    def scaling_of(self, module: str) -> float:
        """The factor on B A: alpha / r, with rsLoRA alpha / sqrt(r)."""
        rank, alpha = self.rank_of(module), self.alpha_pattern.get(_pattern_of(self.alpha_pattern, module), self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def is_target(self, module: str) -> bool:
        """Whether peft puts a LoRA on a module of that name, by its own rules."""
        if isinstance(self.exclude, str):
            if self.exclude and re.fullmatch(self.exclude, module):
                return False
        elif _ends_with(module, self.exclude):
            return False
        if self.is_saved(module) or self.targets is None:
            return False
        if isinstance(self.targets, str):
            return self.targets == "all-linear" or re.fullmatch(self.targets, module) is not None
        if module in self.targets or not _ends_with(module, self.targets):
            return module in self.targets
        return not self.layers or self._layer_of(module) in self.layers

    def is_saved(self, module: str) -> bool:
        """Whether a module is, or lies in, one of ``modules_to_save``."""
        return any(lies_in(name, module) for name in self.modules_to_save)

    def _layer_of(self, module: str) -> int | None:
        patterns = [_numbered(p) for p in self.layers_pattern] or [r".*?\.[^.]*\.(?P<bmm_layer>\d{1,9})\."]
        found = next((m for m in (re.match(p, module) for p in patterns) if m), None)
        return int(found["bmm_layer"]) if found else None


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The settings in ``folder``; `CheckpointError` names whatever a merge cannot honour, before any work."""
    path = folder / CONFIG
    raw = read_json(inside(folder, CONFIG), "adapter configuration")
    kind = raw.get("peft_type")
    if kind != "LORA":
        said = kind if isinstance(kind, str) and kind.isidentifier() else repr(kind)[:60]
        raise CheckpointError(f"{path}: a {said} adapter; only LORA can be opened", MERGE_WITH_PEFT)
    _refuse_others(path, raw)
    config = AdapterConfig(
        path=path,
        rank=_rank(path, "r", raw.get("r")),
        alpha=_number(path, "lora_alpha", raw.get("lora_alpha")),
        rank_pattern={k: _rank(path, f"rank_pattern[{k!r}]", v) for k, v in _mapping(path, raw, "rank_pattern")},
        alpha_pattern={k: _number(path, f"alpha_pattern[{k!r}]", v) for k, v in _mapping(path, raw, "alpha_pattern")},
        rslora=_flag(path, raw, "use_rslora"),
        dora=_flag(path, raw, "use_dora"),
        bias=raw.get("bias") or "none",
        lora_bias=_flag(path, raw, "lora_bias"),
        fan_in_fan_out=_flag(path, raw, "fan_in_fan_out"),
        targets=_names(path, raw, "target_modules", None),
        exclude=_names(path, raw, "exclude_modules", ()) or (),
        layers=_indices(path, raw, "layers_to_transform"),
        layers_pattern=_listed(path, raw, "layers_pattern"),
        modules_to_save=_listed(path, raw, "modules_to_save"),
        tokens=_tokens(path, raw.get("trainable_token_indices")),
        ties=_flag(path, raw, "ensure_weight_tying"),
        base=str(raw.get("base_model_name_or_path") or ""),
    )
    if config.bias not in ("none", "all", "lora_only"):
        raise CheckpointError(f"{path}: bias is {config.bias!r}", "none, all or lora_only")
    for pattern, used in _regexes(config):
        try:
            re.compile(used)
        except (re.error, OverflowError, RecursionError) as error:
            shown = f"{pattern[:100]!r} is no pattern ({reason(error)})"
            raise CheckpointError(f"{path}: {shown}", "repair it by hand") from None
    return config


def lies_in(name: str, module: str) -> bool:
    """Whether ``module`` is, or lies in, a module of that name, which may be a pattern."""
    return re.match(_saved(name), module) is not None


def _refuse_others(path: Path, raw: Mapping[str, Any]) -> None:
    """Options that change the weights and are not read here must not be set, known to this version or not."""
    odd = [
        f"{key[:60]}={str(value)[:60]}"
        for key, value in raw.items()
        if key not in WITHOUT_EFFECT and key not in READ and value not in (None, False, [], {}, "")
    ]
    if odd:
        raise CheckpointError(f"{path}: LoRA with {some(odd)}, which is not supported", MERGE_WITH_PEFT)
    start = raw.get("init_lora_weights", True)
    if start not in KEEPS_BASE:
        raise CheckpointError(
            f"{path}: init_lora_weights is {start!r}, which changes the base's own weights",
            "save it with path_initial_model_for_weight_conversion, or " + MERGE_WITH_PEFT,
        )


def _regexes(config: AdapterConfig) -> Iterable[tuple[str, str]]:
    """Every pattern of the file, and what is made of it: a flag or a group may be sound alone and not inside."""
    yield from ((t, t) for t in (config.targets, config.exclude) if isinstance(t, str))
    yield from ((p, _ending(p)) for p in (*config.rank_pattern, *config.alpha_pattern))
    yield from ((p, _saved(p)) for p in config.modules_to_save)
    yield from ((p, _numbered(p)) for p in config.layers_pattern)


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _saved(name: str) -> str:
    return rf"(^|.*\.){name}($|\..*)"


def _numbered(pattern: str) -> str:
    """Up to nine digits after a list of layers: no model has more, and Python refuses to read thousands."""
    return rf"(?:^|.*?\.){pattern}\.(?P<bmm_layer>\d{{1,9}})\."


def _pattern_of(patterns: Iterable[str], module: str) -> str:
    return next((p for p in patterns if re.match(_ending(p), module)), "")


def _ends_with(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _wrong(path: Path, key: str, value: Any, expected: str) -> CheckpointError:
    shown = repr(value)[:100]
    return CheckpointError(f"{path}: {key} is {shown}, not {expected}", "download or save the adapter again")


def _rank(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise _wrong(path, key, value, "a positive whole number below 2^31")
    return value


def _number(path: Path, key: str, value: Any) -> float:
    try:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        pass
    raise _wrong(path, key, value, "a finite number")


def _flag(path: Path, raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value not in (None, True, False) or (isinstance(value, int) and not isinstance(value, bool)):
        raise _wrong(path, key, value, "true or false")
    return bool(value)


def _mapping(path: Path, raw: Mapping[str, Any], key: str) -> Iterable[tuple[str, Any]]:
    value = raw.get(key) or {}
    if not isinstance(value, Mapping):
        raise _wrong(path, key, value, "a mapping")
    return value.items()


def _names(path: Path, raw: Mapping[str, Any], key: str, missing: Any) -> tuple[str, ...] | str | None:
    value = raw.get(key)
    if value is None or isinstance(value, str):
        return missing if value is None else value
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise _wrong(path, key, value, "a list of names")
    return tuple(value)


def _listed(path: Path, raw: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = _names(path, raw, key, ())
    return (found,) if isinstance(found, str) else tuple(found or ())


def _indices(path: Path, raw: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = raw.get(key)
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(item) is int for item in listed):
        raise _wrong(path, key, value, "whole numbers")
    return tuple(listed)


def _tokens(path: Path, value: Any) -> Mapping[str, tuple[int, ...]] | tuple[int, ...] | None:
    """Rows of the input embeddings that were trained alone, or by the module's name."""
    if value is None:
        return None
    lists = list(value.values()) if isinstance(value, Mapping) else [value]
    for rows in lists:
        fits = isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows)
        if not fits or len(set(rows)) != len(rows):
            raise _wrong(path, "trainable_token_indices", value, "lists of different row numbers")
    return {k: tuple(v) for k, v in value.items()} if isinstance(value, Mapping) else tuple(value)
