"""Build the model of a Hugging Face folder without its weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from ..errors import RecipeError


def from_transformers(folder: str | Path) -> tuple[nn.Module, dict[str, str]]:
    """The architecture named in ``folder/config.json``, with untrained weights, and `stored_names` of it.

    Raises:
        RecipeError: no config, no architecture in it, transformers not installed, or it does not know the class.
    """
    hint = "give model: FILE.py:FUNCTION, a function that returns the torch.nn.Module"
    config_file = Path(folder) / "config.json"
    if not config_file.is_file():
        raise RecipeError(f"{folder} has no config.json to build the model from", hint)
    try:
        names = json.loads(config_file.read_text()).get("architectures") or []
    except (ValueError, RecursionError, AttributeError) as error:
        raise RecipeError(f"{config_file} is not a JSON object", hint) from error
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise RecipeError(f"{config_file} names no architecture", hint)
    try:
        import transformers
    except ImportError as error:
        raise RecipeError("this checkpoint needs transformers", "pip install 'bmm-tuner[hf]'") from error
    kind = getattr(transformers, names[0], None)
    if kind is None or not hasattr(kind, "config_class"):
        raise RecipeError(f"transformers {transformers.__version__} has no {names[0]}", hint)
    try:
        model = kind(kind.config_class.from_pretrained(str(folder)))
        return model, stored_names(model)
    except RecipeError:
        raise
    except Exception as error:  # a damaged config fails anywhere in transformers
        raise RecipeError(
            f"{config_file}: transformers cannot build {names[0]}: {' '.join(str(error).split())[:300]}", hint
        ) from error


def stored_names(model: nn.Module) -> dict[str, str]:
    """Checkpoint name -> model name of every weight: transformers 5 stores some architectures under older names.

    The renaming is transformers' own, applied to placeholders that know where they come from. A weight that is stored
    split, fused or transposed has no single place in the model.

    Raises:
        RecipeError: such a weight, by name.
    """
    own = model.state_dict()
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5 both names are one
        return {name: name for name in own}
    order = list(own)
    # A zero-stride tensor that holds its own index takes no memory, whatever the model's size.
    marked = {n: torch.tensor(float(k), dtype=torch.float64).expand(own[n].shape) for k, n in enumerate(order)}
    names = {}
    for stored, tensor in revert_weight_conversion(model, marked).items():  # type: ignore[arg-type]
        mark = tensor[(0,) * tensor.dim()]
        source = order[int(mark)]
        # A mere renaming keeps the zero strides; only what was rebuilt has to be read.
        uniform = not any(tensor.stride()) or bool((tensor == mark).all())
        if tensor.shape != own[source].shape or not uniform:
            raise RecipeError(
                f"{stored} is stored in another form than {type(model).__name__} computes with",
                "give model: FILE.py:FUNCTION, a module whose parameters are exactly the checkpoint's",
            )
        names[stored] = source
    return names
