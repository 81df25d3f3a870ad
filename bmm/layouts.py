"""Which weights are matrices that a regression can solve, and how each is stored."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from .checkpoint import ModelPool
from .grams import TaskGrams
from .roles import conv1d_weights, role_of


def matrix(tensor: Tensor, layout: str) -> Tensor:
    """A stored weight as (o, i): transformers' Conv1D is transposed, convolutions are flattened, norms one column."""
    if layout == "norm":
        return tensor.reshape(-1, 1)
    return tensor.mT if layout == "conv1d" else tensor.flatten(1)


def matrix_layouts(
    pool: ModelPool, task_grams: Sequence[TaskGrams] | None, transposed: Collection[str] = ()
) -> dict[str, str]:
    """Weights the solver takes: those with a data Gram, or without data all 2-d and convolution weights but embeddings.

    ``transposed``: weights stored (in, out), besides those that the base's configuration tells.
    """
    if task_grams:
        layouts: dict[str, str] = {}
        for grams in task_grams:
            layouts |= {name: grams.layout[name] for name in grams.key_of if name in pool.float_names}
        return layouts
    shapes = {name: tuple(pool.shape(name)) for name in pool.float_names}
    return solvable(shapes, getattr(pool.base, "config", {}), pool.tied, transposed)


def solvable(
    shapes: Mapping[str, Sequence[int]],
    config: Mapping[str, object] | None = None,
    tied: Sequence[Sequence[str]] = (),
    transposed: Collection[str] = (),
) -> dict[str, str]:
    """Layouts of the weights that data-free BMM solves, of parameters with these shapes.

    What is looked up in a table by the model (embeddings, positions) multiplies no input: it keeps the anchor, and what
    is tied to it with it.
    """
    tables = {n for n in shapes if role_of(n) == "embed"}
    tables |= {n for group in tied if any(role_of(m) == "embed" for m in group) for n in group}
    turned = {*transposed, *conv1d_weights(config, shapes)}
    return {
        name: "conv2d" if len(shape) == 4 else "conv1d" if name in turned else "linear"
        for name, shape in shapes.items()
        if len(shape) in (2, 4) and name.endswith("weight") and name not in tables
    }


def transposed_weights(pool: ModelPool, model: nn.Module | None, stored: Mapping[str, str]) -> list[str]:
    """Weights stored (in, out), transformers' Conv1D: by ``model`` where there is one, else by the base's config.json.

    ``stored``: the model's names of weights -> the pool's, where they differ.
    """
    if model is None:
        return conv1d_weights(getattr(pool.base, "config", None), pool.names)
    weights = [f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Conv1D"]
    return [name for weight in weights if (name := stored.get(weight, weight)) in pool.base]
