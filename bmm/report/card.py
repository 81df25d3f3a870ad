"""The model card of a merged checkpoint."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import date
from importlib import metadata

import yaml

from ..records import StudyResult
from .choice import choice_lines
from .goals import goal_lines
from .layout import markdown
from .tables import gap_line, hyperparameter_table, measure, score_table

PACKAGES = ("bmm-tuner", "torch", "ax-platform", "botorch", "gpytorch", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def study_card(result: StudyResult, recipe_yaml: str, command: str = "bmm tune --recipe bmm_recipe.yaml") -> str:
    """README.md of a tuned merge: what was merged, how, the scores, and the command that does it again."""
    split = "test" if result.test else "validation"
    return _card(
        f"tuned over {len(result.trials)} trials around the anchor `{result.recipe['anchor']}`",
        result.recipe,
        recipe_yaml,
        [
            f"## {split.capitalize()} {measure(result.recipe, split)} (%)",
            score_table(result.test or result.validation),
            gap_line(result, "test" if result.test else "validation"),
            f"## Hyperparameters (trial {result.best.number})",
            *goal_lines(result),
            *choice_lines(result),
            hyperparameter_table(result.hyperparameters),
            f"Repeat with `{command}`.",
        ],
    )


def merge_card(title: str, recipe: Mapping[str, object], recipe_yaml: str, command: str) -> str:
    """README.md of a single merge."""
    return _card(title, recipe, recipe_yaml, [f"Repeat with `{command}`."])


def average_card(method: str, options: Mapping[str, object], shares: Mapping[str, float], batchnorm: str) -> str:
    """README.md of an average over one run's checkpoints: ``shares`` gives each one's weight, oldest first."""
    front = yaml.safe_dump({"tags": ["merge", "bmm"], "library_name": "bmm-tuner"}, sort_keys=False)
    flags = "".join(f" --{name.replace('_', '-')} {value}" for name, value in options.items() if name != "each")
    statistics = {
        "recompute": "BatchNorm statistics were measured anew on calibration inputs.",
        "last": "BatchNorm statistics are the last checkpoint's.",
        "average": "BatchNorm statistics are averaged like the weights.",
    }
    body = [
        f"---\n{front}---",
        "# Averaged model",
        f"Average (`{method}`) of {len(shares)} checkpoints of one training run; {date.today().isoformat()}.",
        *([statistics[batchnorm]] if batchnorm else []),
        "## Checkpoints and their weights",
        markdown(["checkpoint", "weight"], [[f"`{path}`", f"{share:.6g}"] for path, share in shares.items()]),
        f"Repeat with `bmm average CHECKPOINTS --method {method}{flags} --out FOLDER`.",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in versions().items()) + ".",
    ]
    return "\n\n".join(body) + "\n"


def _card(what: str, recipe: Mapping[str, object], recipe_yaml: str, parts: list[str]) -> str:
    experts = recipe.get("experts") or {}
    assert isinstance(experts, Mapping)
    source = f"zoo `{recipe.get('zoo') or 'vit8'}`" if not experts else f"base `{recipe['base']}`"
    named = [f"- {name}: `{path}`" for name, path in experts.items()]
    front = yaml.safe_dump({"tags": ["merge", "bmm"], "library_name": "bmm-tuner"}, sort_keys=False)
    used = ", ".join(f"{k} {v}" for k, v in versions().items())
    body = [
        f"---\n{front}---",
        "# Merged model",
        f"Bayesian Model Merging (arXiv 2605.12843), {what}; {source}; {date.today().isoformat()}.",
        *(["## Experts", "\n".join(named)] if named else []),
        *parts,
        "## Recipe",
        f"```yaml\n{recipe_yaml or '{}'}```".replace("{}```", "{}\n```"),
        f"Seed {recipe.get('seed', 0)}. Versions: {used}.",
    ]
    return "\n\n".join(body) + "\n"
