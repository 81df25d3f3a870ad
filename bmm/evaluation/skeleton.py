"""Build the model of a Hugging Face folder without its weights."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from .experts import DOWN, GATE_UP, separate, stacked_experts
from .sizes import Room

_HINT = "give model: FILE.py:FUNCTION, a function that returns the torch.nn.Module"
_OLD_NAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
"""Names of checkpoints converted from TensorFlow, which transformers still reads."""


def from_transformers(
    folder: str | Path, stored: Iterable[str] = (), outline: bool = False
) -> tuple[nn.Module, dict[str, str]]:
    """The architecture named in ``folder/config.json``, its weights not set, and the model's name of every stored one.

    ``stored``: the checkpoint's own names, of which some may be older than those transformers would write today. Where
    a Mixture of Experts is stored one matrix a name, the model holds one Linear a matrix (`SeparateExperts`).

    ``outline``: on the meta device, where it takes no memory and computes nothing. Without, it is built there first
    and compared in size with the weights in the folder, before any memory is taken.

    Raises:
        RecipeError: no config, no architecture in it, transformers not installed, or it does not know the class; a
        model of more than twice the entries that the folder's weight files hold.
    """
    config_file = Path(folder) / "config.json"
    if not config_file.is_file():
        raise RecipeError(f"{folder} has no config.json to build the model from", _HINT)
    try:
        names = json.loads(config_file.read_text()).get("architectures") or []
    except (ValueError, RecursionError, AttributeError) as error:
        raise RecipeError(f"{config_file} is not a JSON object", _HINT) from error
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise RecipeError(f"{config_file} names no architecture", _HINT)
    try:
        import transformers
    except ImportError as error:
        raise RecipeError("this checkpoint needs transformers", "pip install 'bmm-tuner[hf]'") from error
    kind = getattr(transformers, names[0], None)
    if kind is None or not hasattr(kind, "config_class"):
        raise RecipeError(f"transformers {transformers.__version__} has no {names[0]}", _HINT)
    try:
        return _built(kind, folder, stored, outline)
    except RecipeError:
        raise
    except Exception as error:  # a damaged config fails anywhere in transformers
        raise RecipeError(
            f"{config_file}: transformers cannot build {names[0]}: {' '.join(str(error).split())[:300]}", _HINT
        ) from error


def _built(kind: Any, folder: str | Path, stored: Iterable[str], outline: bool) -> tuple[nn.Module, dict[str, str]]:
    config = kind.config_class.from_pretrained(str(folder))
    model = _outline(kind, config, Room.of(Path(folder)))
    if not outline:
        with _unset_weights():
            model = kind(config)
        _set_buffers(model)
    found = stored_names(model)
    apart = {own.rpartition(".experts.")[0] + ".experts" for own in found.values() if ".experts." in own}
    for path in stacked_experts(model):
        if path in apart:
            separate(model, path)
    return model, found | _older_names(model, found, stored)


def _outline(kind: Any, config: Any, room: Room | None) -> nn.Module:
    """The model on the meta device; `RecipeError` where it has no ``room`` in the checkpoint."""
    with torch.device("meta"):
        if room is None:
            return cast(nn.Module, kind(config))
        with room.bounding():
            model: nn.Module = kind(config)
    model.tie_weights()  # type: ignore[operator]
    room.require(model)
    return model


def stored_names(model: nn.Module) -> dict[str, str]:
    """Checkpoint name -> model name of every weight: transformers 5 stores some architectures under other names.

    The renaming is transformers' own, applied to placeholders that know where they come from. The matrices of stacked
    experts get the names they have in `SeparateExperts`; any other weight that is stored split, fused or transposed
    has no single place in the model.

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
    for path in stacked_experts(model):
        for name, marks, matrices in _expert_marks(own, path, len(order)):
            marked[name] = marks
            order += matrices
    names = {}
    for stored, tensor in revert_weight_conversion(model, marked).items():  # type: ignore[arg-type]
        if stored in marked and marked[stored] is tensor:
            names[stored] = stored  # as the model has it
            continue
        mark = tensor[(0,) * tensor.dim()]
        source = order[int(mark)]
        # A mere renaming keeps the zero strides; only what was rebuilt has to be read.
        uniform = not any(tensor.stride()) or bool((tensor == mark).all())
        if (source in own and tensor.shape != own[source].shape) or not uniform:
            raise RecipeError(
                f"{stored} is stored in another form than {type(model).__name__} computes with",
                "give model: FILE.py:FUNCTION, a module whose parameters are exactly the checkpoint's",
            )
        names[stored] = source
    return names


def _expert_marks(own: dict[str, Tensor], path: str, start: int) -> Iterator[tuple[str, Tensor, list[str]]]:
    """Placeholders of a layer's two stacks with a number a matrix, from ``start`` on, and the matrices' names."""
    count = len(own[f"{path}.{DOWN}"])
    for stack, parts in ((GATE_UP, ("gate_proj", "up_proj")), (DOWN, ("down_proj",))):
        matrices = [f"{path}.{e}.{part}.weight" for e in range(count) for part in parts]
        marks = torch.arange(start, start + len(matrices), dtype=torch.float64).reshape(count, len(parts), 1)
        yield f"{path}.{stack}", marks, matrices
        start += len(matrices)


def _older_names(model: nn.Module, known: dict[str, str], stored: Iterable[str]) -> dict[str, str]:
    """The model's names of what is stored under names of earlier times, or without the prefix of the base model."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = {}
    for name in stored:
        plain = name
        for pattern, new in _OLD_NAMES:
            plain = re.sub(pattern, new, plain)
        for candidate in (plain, prefix + plain, plain.removeprefix(prefix)):
            if name not in known and candidate in known:
                found[name] = known[candidate]
                break
    return found


def may_be_absent(model: nn.Module, name: str) -> bool:
    """Whether transformers passes over a stored tensor of that name: buffers that once were saved with the weights."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    if patterns is None:
        return False
    buffers = [n.rpartition(".")[2] for n, _ in model.named_buffers()]
    once_saved = [rf"(^|\.){b}$" for b in ("position_ids", "inv_freq", "masked_bias") if b in buffers]
    return any(re.search(pattern, name) for pattern in (*patterns, *once_saved))


@contextlib.contextmanager
def _unset_weights() -> Iterator[None]:
    """Weights are allocated and not touched: they take no memory until they are replaced, nor time to draw."""
    from importlib import import_module

    try:
        place = import_module("transformers.initialization")
    except ImportError:  # before transformers 5
        place = import_module("transformers.modeling_utils")
    with place.no_init_weights():
        yield


def _set_buffers(model: nn.Module) -> None:
    """What `_unset_weights` left out and no checkpoint brings: ties, and buffers that are computed."""
    model.tie_weights()  # type: ignore[operator]
    for module in model.modules():
        if module._non_persistent_buffers_set:
            model._init_weights(module)  # type: ignore[operator]
