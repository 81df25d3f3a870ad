"""The recipe: everything that defines a run, from YAML, from flags or from Python; checked before work starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from . import anchors
from .checkpoint.heads import HEADS
from .checkpoint.vocabulary import VOCABULARIES
from .errors import RecipeError, did_you_mean
from .evaluation.holdout import HIGHEST_SHARE
from .groups import AUTO, REFINABLE, SCHEMES
from .records import RENAMED
from .search.choice import METHODS
from .search.engine import ENGINES
from .search.goal import EVERY, KINDS, check_floors, check_stopping, parse_objectives
from .yaml_file import parse_mapping, read_text

GRAMS = ("data", "datafree", "hybrid")
FISHERS = ("auto", "sampled", "true")
AUTOCASTS = ("none", "bfloat16", "float16")
DTYPES = ("same", "float32", "bfloat16", "float16")
NORMALISE = ("trace", "none")
INPUTS = ("experts", "merged")
NORMS = ("anchor", "regression")
BIAS = ("joined", "anchor")
SEARCH = ("gamma", "weights", "anchor_scale")
TASK_FILES = (".yaml", ".yml", ".json")
SCORES = ("labels", "agreement")
EXECUTORS = ("local", "ray")


def _key(default: Any, help: str, **meta: Any) -> Any:
    """A recipe key: its default, the text of its flag, and what values it takes."""
    meta["help"] = help
    if callable(default):
        return field(default_factory=default, metadata=meta)
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Recipe:
    """All keys of a run; the same names are keys of the YAML file and long flags of the command line."""

    zoo: str = _key("", "An embedded zoo in place of base, experts, tasks and model: vit8, vit20 (needs its folder).")
    base: str = _key("", "Base checkpoint: a Hugging Face folder or one .safetensors/.bin/.pt file.")
    experts: dict[str, str] = _key(dict, "Expert checkpoints by task name: NAME=PATH.", mapping="str")
    model: str = _key("transformers", "Builds the model: 'transformers' (from the base's config), or FILE.py:FUNCTION.")
    tasks: str = _key(
        "", "A task file (.yaml, .json; docs/tasks.md), or FILE.py:FUNCTION (MODULE:FUNCTION) that returns bmm.Tasks."
    )
    skip: tuple[str, ...] = _key((), "Glob patterns of parameters to leave out of the merge (task heads).", many=True)
    vocabulary: str = _key(
        "refuse",
        "Experts whose tokens are not the base's: refuse; rows: pair by row number; base: keep the base's tokens; "
        "union: take in the experts' added tokens.",
        choices=VOCABULARIES,
    )
    heads: str = _key(
        "refuse",
        "Task heads: refuse those that differ; base: keep the base's; keep: as base, and write each expert's own to "
        "heads/TASK.safetensors.",
        choices=HEADS,
    )
    anchor: str = _key(
        "tsv", "The prior: METHOD or METHOD+lines of `bmm anchors`, or path:FOLDER for a merge made elsewhere."
    )
    knobs: dict[str, Any] = _key(dict, "The anchor's knobs: NAME=VALUE (see `bmm anchors NAME`).", mapping="number")
    grams: str = _key("hybrid", "Gram matrices: activations, task vectors, or a mix of both.", choices=GRAMS)
    gamma: float = _key(0.5, "Share of the data-free Gram when grams is hybrid.", low=0.0, high=1.0)
    calibration: int = _key(64, "Calibration inputs a task for data-driven Grams and Fishers.", low=1)
    fisher: str = _key(
        "auto",
        "Labels of Fishers: sampled from the model, or the true ones; auto is sampled, only where a method needs them.",
        choices=FISHERS,
    )
    normalise: str = _key("trace", "Scale every Gram to mean eigenvalue 1, or leave it.", choices=NORMALISE)
    inputs: str = _key(
        "experts",
        "Whose activations the Grams are of: each expert's, or the merged model's, block by block.",
        choices=INPUTS,
    )
    norms: str = _key("anchor", "Norm layers: keep the anchor, or join the regression.", choices=NORMS)
    bias: str = _key("joined", "Biases: solved with their weight (needs data), or keep the anchor.", choices=BIAS)
    weights: dict[str, float] = _key(
        dict, "Task weights in merge, regression and objective: NAME=VALUE, 1 if unnamed.", mapping="float"
    )
    groups: str = _key(
        "depth",
        "What shares one (lam, rho) pair; auto: by role and depth, as fine as the budget allows.",
        choices=(*SCHEMES, AUTO),
    )
    bands: int = _key(4, "Depth bands when groups is depth or bands.", low=1)
    group: dict[str, str] = _key(dict, "Override a module's group: PATTERN=GROUP.", mapping="str")
    log10_lam: tuple[float, float] = _key((-4.0, 3.0), "Range of log10(lam), the prior's precision.", pair=True)
    rho: tuple[float, float] = _key((0.0, 3.0), "Range of rho, the assembly scale: 0 is the base.", pair=True)
    search: tuple[str, ...] = _key(
        (),
        "What is searched besides lam and rho: gamma (of hybrid Grams), weights (one a task), anchor_scale.",
        many=True,
        choices=SEARCH,
    )
    score_by: str = _key(
        "labels",
        "What a validation score is: the task's score against its labels, or, without labels, agreement with the "
        "expert's class probabilities.",
        choices=SCORES,
    )
    goal: str = _key(
        "mean",
        "What is maximised of score / expert's score: the weighted mean, the worst task, the weighted geometric mean.",
        choices=KINDS,
    )
    floor: dict[str, float] = _key(
        dict,
        "No task below this share of its expert's score: one number for all tasks, or TASK=SHARE.",
        mapping="float",
        bare=EVERY,
    )
    objectives: tuple[str, ...] = _key(
        (),
        "Two or more objectives to trade against one another: TASK or NAME=TASK+TASK, separated by commas.",
        many=True,
        separator=",",
    )
    budget: int = _key(50, "Trials in all, the anchor and the default included.", low=2)
    engine: str = _key(
        "botorch",
        "What proposes the next trial. " + ". ".join(f"{name}: {row.summary}" for name, row in ENGINES.items()) + ".",
        choices=tuple(ENGINES),
    )
    early_stopping: float = _key(
        0.0,
        "Stop a trial that is the best with a probability below this, by the tasks so far; 0: never.",
        low=0,
        high=0.5,
    )
    workers: int = _key(1, "Trials evaluated at a time, each by a process of its own.", low=1)
    executor: str = _key(
        "local", "Where workers run: on this machine, or in a Ray cluster (one that runs, else a local one).",
        choices=EXECUTORS,
    )  # fmt: skip
    refine: bool = _key(
        False,
        "Search in stages: one (lam, rho) for the whole model, then one a role, then one a group, each stage from the "
        "best so far.",
    )
    choice: str = _key(
        "observed",
        "What stands for a trial's validation score in the final choice: the observed one, or the mean of a model of "
        "all trials.",
        choices=METHODS,
    )
    holdout: float = _key(
        0.0,
        "Share of each task's validation inputs that the search does not see: finalists are scored on them, and the "
        "winner is chosen by both scores; 0: no such race.",
        low=0,
        high=HIGHEST_SHARE,
    )
    finalists: int = _key(8, "Trials in that race.", low=2)
    seed: int = _key(0, "Seed of every random draw.", low=0)
    out: str = _key("", "Folder for the study, the merged checkpoint and the report (default: runs/NAME).")
    device: str = _key("cpu", "Where modules are prepared, merged and evaluated: cpu, cuda, cuda:1, ...")
    autocast: str = _key("none", "Mixed precision of evaluation.", choices=AUTOCASTS)
    batch_size: int = _key(64, "Inputs a batch while Grams and Fishers are collected.", low=1)
    max_memory: float = _key(
        0.0,
        "Memory for matrices, in GiB: Grams are collected in parts that fit, and a merge whose largest module does not "
        "fit is refused before it starts; 0: no limit.",
        low=0,
    )
    dtype: str = _key("same", "Storage type of the merged checkpoint; same as the base's by default.", choices=DTYPES)
    adapter_rank: int = _key(
        0, "Write the merge as a LoRA adapter on the base, of at most this rank; 0: as a full model.", low=0
    )
    shard_gib: float = _key(4.0, "Largest shard of the merged checkpoint, in GiB.", low=0.000001)
    cache: str = _key("", "Folder for cached Grams and Fishers (default: $BMM_CACHE, else ~/.cache/bmm).")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the ones that differ from the defaults first being written by `to_yaml`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def to_yaml(self) -> str:
        """YAML of the keys that are set, in order."""
        blank = Recipe().to_dict()
        return yaml.safe_dump({k: v for k, v in self.to_dict().items() if v != blank[k]}, sort_keys=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Build and check a recipe. Raises `RecipeError` for unknown keys and impossible values."""
        known = {f.name: f for f in fields(cls)}
        for key in raw:
            if key not in known:
                new = RENAMED.get(str(key))
                hint = f"its name is {new} now" if new else did_you_mean(str(key), known)
                raise RecipeError(f"{where}: unknown key {key!r}", hint)
        values = {key: _coerce(key, value, known[key].metadata, known[key].type, where) for key, value in raw.items()}
        return cls(**values).checked(where)

    @classmethod
    def load(cls, path: Path | str, **overrides: Any) -> Recipe:
        """Read a YAML recipe; relative paths in it are relative to the file; ``overrides`` win."""
        path = Path(path)
        raw = parse_mapping(read_text(path), str(path), "see README, 'Recipes'")
        recipe = cls.from_dict(raw, str(path))
        return cls.from_dict(recipe.relative_to(path.parent).to_dict() | overrides, str(path))

    def relative_to(self, folder: Path) -> Recipe:
        """Resolve relative paths against ``folder``, where the recipe file lies."""

        def resolve(text: str) -> str:
            return text if not text or Path(text).is_absolute() else str((folder / text).resolve())

        def target(text: str) -> str:
            name, _, function = text.partition(":")
            if text.endswith(TASK_FILES):
                return resolve(text)
            return f"{resolve(name)}:{function}" if name.endswith(".py") else text

        anchor = self.anchor
        if anchor.startswith("path:"):
            anchor = "path:" + resolve(anchor.removeprefix("path:"))
        return replace(
            self,
            base=resolve(self.base),
            experts={k: resolve(v) for k, v in self.experts.items()},
            tasks=target(self.tasks),
            model=target(self.model),
            anchor=anchor,
        )

    def checked(self, where: str = "recipe") -> Recipe:
        """This recipe if it can run; raises `RecipeError` otherwise."""
        for low, high, key in ((*self.log10_lam, "log10_lam"), (*self.rho, "rho")):
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise RecipeError(f"{where}: {key} range {low}..{high} is empty", "give low < high")
        if self.zoo and (self.base or self.experts or self.tasks):
            raise RecipeError(f"{where}: zoo and base/experts/tasks exclude each other", "drop one of the two")
        if not self.anchor.startswith("path:"):
            anchors.resolve_knobs(anchors.get(self.anchor), self.knobs)
        elif self.knobs:
            raise RecipeError(f"{where}: an anchor read from a path takes no knobs", "drop knobs")
        if self.grams == "datafree":
            for key, value in (("inputs", "merged"), ("norms", "regression")):
                if getattr(self, key) == value:
                    raise RecipeError(
                        f"{where}: {key}: {value} needs calibration inputs, and grams is datafree",
                        f"use grams: data or hybrid, or drop {key}",
                    )
        if "gamma" in self.search and self.grams != "hybrid":
            raise RecipeError(f"{where}: search has gamma, but grams is {self.grams}", "gamma mixes hybrid Grams")
        check_floors(self.floor)
        parse_objectives(self.objectives)
        if self.refine and self.groups == "global":
            raise RecipeError(f"{where}: refine needs groups to go to, and groups is global", REFINABLE)
        if self.finalists != Recipe.finalists and not self.holdout:
            raise RecipeError(f"{where}: finalists are for a race on held-out inputs", "give holdout, e.g. 0.25")
        check_stopping(self.early_stopping, self.goal, self.floor, self.objectives)
        for name, weight in self.weights.items():
            if not math.isfinite(weight):
                raise RecipeError(f"{where}: weight of {name} is {weight}", "task weights are finite numbers")
        return self

    def require_evidence(self) -> None:
        """Raise `RecipeError` for weights BMM cannot use: its regression weighs evidence."""
        for name, weight in self.weights.items():
            if weight < 0:
                raise RecipeError(
                    f"weight of {name} is {weight}: BMM takes none below 0", "negative weights are for plain merges"
                )


class _Unfit(TypeError):
    """Says what was expected."""


def _coerce(key: str, value: Any, meta: Mapping[str, Any], kind: Any, where: str) -> Any:
    """Bring a YAML value to a key's type, or say what the type is."""
    kind = str(kind)
    try:
        if meta.get("mapping"):
            if "bare" in meta and isinstance(value, int | float) and not isinstance(value, bool):
                value = {meta["bare"]: value}
            if not isinstance(value, Mapping):
                raise _Unfit("a mapping")
            converters: dict[str, Callable[[Any], Any]] = {"str": str, "float": float, "number": lambda v: v}
            convert = converters[meta["mapping"]]
            return {str(k): convert(v) for k, v in value.items()}
        if meta.get("pair"):
            low, high = value
            return (float(low), float(high))
        if meta.get("many"):
            if "separator" in meta:  # repeated elements are for the recipe's own check
                texts = [value] if isinstance(value, str) else value
                if not isinstance(texts, list | tuple):
                    raise _Unfit("a list")
                return tuple(part for text in texts for part in str(text).split(meta["separator"]))
            if isinstance(value, str):
                raise _Unfit("a list")
            values = tuple(str(v) for v in value)
            for name in values:
                if name not in meta.get("choices", values):
                    raise RecipeError(f"{where}: no {key} {name!r}", did_you_mean(name, meta["choices"]))
            return tuple(dict.fromkeys(values))
        if kind == "int":
            if isinstance(value, bool) or int(value) != value:
                raise _Unfit("a whole number")
            value = int(value)
        elif kind == "float":
            value = float(value)
        elif kind == "bool":
            if not isinstance(value, bool):
                raise _Unfit("true or false")
        elif not isinstance(value, str):
            raise _Unfit("text")
    except (TypeError, ValueError) as error:
        what = str(error) if isinstance(error, _Unfit) else "a number"
        what = "two numbers, low and high" if meta.get("pair") else what
        raise RecipeError(f"{where}: {key} = {value!r} does not fit: {what} expected", meta["help"]) from error
    if "choices" in meta and value not in meta["choices"]:
        raise RecipeError(f"{where}: no {key} {value!r}", did_you_mean(value, meta["choices"]))
    low, high = meta.get("low", -math.inf), meta.get("high", math.inf)
    if isinstance(value, int | float) and not low <= value <= high:
        limit = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise RecipeError(f"{where}: {key} is {value}, must be {limit}", meta["help"])
    return value


def storage_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name, one of `DTYPES`; None for "same". Raises `RecipeError` for any other."""
    if name not in DTYPES:
        raise RecipeError(f"no dtype {name!r}", did_you_mean(name, DTYPES))
    return None if name == "same" else getattr(torch, name)
