"""The embedded zoo: a small vision transformer, experts fine-tuned from it on real tasks, and their data.

`vit8` ships with the package. `vit20` adds twelve experts, which lie in ``examples/vit20/zoo`` of the repository.
How both were made: `bmm.zoo.build`; their table of accuracies: README.md beside this file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from ..evaluation import Task

VIT8 = ("fashion_mnist", "mnist", "latin", "hiragana", "hebrew", "devanagari", "thai", "emoji_skin_tone")
VIT20 = (
    *VIT8,
    "cyrillic", "greek", "georgian", "arabic", "katakana", "bengali", "tamil", "hangul", "kanji", "armenian",
    "emoji_vendor", "emoji_category",
)  # fmt: skip
NAMES = {"vit8": VIT8, "vit20": VIT20}
HOME = Path(__file__).parent / "vit8"


@dataclass(frozen=True)
class Zoo:
    """Paths of one zoo: the base, the experts by task, and where each task's head and data lie."""

    name: str
    base: Path
    experts: dict[str, Path]
    folders: dict[str, Path]

    def tasks(self) -> list[Task]:
        """One `bmm.Task` an expert, with calibration, validation and test data and the task's frozen head."""
        from .data import load_task

        return [load_task(self.folders[name], name) for name in self.experts]


def extra_folder() -> Path:
    """The folder with the other twelve experts: $BMM_VIT20, or examples/vit20/zoo here or in a source checkout."""
    given = os.environ.get("BMM_VIT20")
    places = [Path(given)] if given else [Path("examples/vit20/zoo"), HOME.parents[2] / "examples" / "vit20" / "zoo"]
    for place in places:
        if (place / "experts").is_dir():
            return place
    raise RecipeError(
        f"the twelve further experts of vit20 are not at {' or '.join(map(str, places))}",
        "run from a clone of the repository, or set BMM_VIT20 to its examples/vit20/zoo",
    )


def find(name: str) -> Zoo:
    """The paths of zoo ``name``. Raises `RecipeError` for an unknown name or a missing folder."""
    if name not in NAMES:
        raise RecipeError(f"no zoo {name!r}", did_you_mean(name, NAMES))
    extra = extra_folder() if name == "vit20" else HOME
    folders = {task: HOME if task in VIT8 else extra for task in NAMES[name]}
    return Zoo(name, HOME / "base", {t: f / "experts" / t for t, f in folders.items()}, folders)


def model() -> nn.Module:
    """The zoo's encoder without trained weights."""
    from .vit import ViTConfig, ZooViT

    return ZooViT(ViTConfig.load(HOME / "base"))
