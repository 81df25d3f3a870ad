"""Build the model of a Hugging Face folder without its weights."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from ..errors import RecipeError


def from_transformers(folder: str | Path) -> nn.Module:
    """The architecture named in ``folder/config.json``, with untrained weights.

    Raises:
        RecipeError: no config, no architecture in it, transformers not installed, or it does not know the class.
    """
    hint = "give model: FILE.py:FUNCTION, a function that returns the torch.nn.Module"
    config_file = Path(folder) / "config.json"
    if not config_file.is_file():
        raise RecipeError(f"{folder} has no config.json to build the model from", hint)
    try:
        names = json.loads(config_file.read_text()).get("architectures") or []
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise RecipeError(f"{config_file} is not a JSON object", hint) from error
    if not names:
        raise RecipeError(f"{config_file} names no architecture", hint)
    try:
        import transformers
    except ImportError as error:
        raise RecipeError("this checkpoint needs transformers", "pip install 'bmm-tuner[hf]'") from error
    kind = getattr(transformers, names[0], None)
    if kind is None:
        raise RecipeError(f"transformers {transformers.__version__} has no {names[0]}", hint)
    return kind(kind.config_class.from_pretrained(str(folder)))
