"""The real studies that tables are measured from, and that winners on them go back to."""

from __future__ import annotations

from typing import Any

from bmm import zoo
from bmm.recipe import Recipe
from bmm.run import Run


def run_of(name: str, **settings: Any) -> Run:
    """A run of a zoo's experts under the recipe keys ``settings``, scored in bfloat16."""
    opened = zoo.find(name)
    recipe = {"base": str(opened.base), "experts": {k: str(v) for k, v in opened.experts.items()}}
    return Run(Recipe.from_dict(recipe | {"autocast": "bfloat16"} | settings), tasks=opened.tasks(), model=zoo.model)
