"""The specification of a given model, from its names and from watching it run; and the proof that it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..evaluation import Task, swapped
from ..evaluation.task import to_device
from ..notation import Tensors
from .names import Transformer, transformer_spec
from .permutation import Permutation
from .spec import Spec
from .trace import trace_spec

Run = Callable[[nn.Module], Tensor]
TOLERANCE = 1e-3
"""Largest change of an output, relative to the largest output, that float32 rounding explains."""


def find_spec(
    known: Transformer,
    model: nn.Module | None = None,
    runs: Iterable[Run] = (),
    names: Mapping[str, str] | None = None,
    residual: bool = False,
) -> Spec:
    """Groups of transformer blocks by name, and of everything else by a trace of ``model`` where one is given.

    A transformer's residual stream stays as it is unless ``residual``; a ResNet's streams are permuted.

    Args:
        known: what names and config tell (`Transformer`).
        model, runs: the network, and functions that run it on examples.
        names: the model's parameter names -> the checkpoint's, where they differ.

    Raises:
        RecipeError: nothing to permute.
    """
    named = transformer_spec(known)
    traced = trace_spec(model, runs, names).groups if model is not None else ()
    axes = {(s.tensor, s.axis) for g in named.groups for s in g.sites}
    tensors = {s.tensor for g in named.groups for s in g.sites}
    added = []
    for group in traced:
        if any(s.tensor not in known.shapes for s in group.sites):
            continue  # tensors that the checkpoints do not hold
        if any((s.tensor, s.axis) in axes for s in group.sites):
            continue  # the block's own group says more: heads, inner permutations
        if residual or not any(s.tensor in tensors for s in group.sites):
            added.append(group)
    return Spec((*named.groups, *added), named.notices).check(known.shapes)


def example_runs(tasks: Sequence[Task], device: torch.device | str = "cpu", inputs: int = 2) -> list[Run]:
    """For each task a function that runs a model on its first validation inputs."""

    def run_of(task: Task) -> Run:
        given, _ = next(task.batches("validation"))
        first = {k: v[:inputs] for k, v in given.items()} if isinstance(given, Mapping) else given[:inputs]
        batch = to_device(first, device)
        return lambda model: task.forward(model, batch)

    return [run_of(task) for task in tasks]


def check_preserved(
    model: nn.Module,
    tensors: Tensors,
    spec: Spec,
    runs: Iterable[Run],
    in_model: Callable[[Tensors], Tensors] = lambda tensors: tensors,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> float:
    """Run the model as it is and with all groups permuted at random; the largest relative change of an output.

    ``in_model``: gives tensors the model's own names.

    Raises:
        RecipeError: the outputs change, so the specification does not fit this network.
    """
    shuffled = Permutation.random(spec, seed).apply(tensors)
    worst = 0.0
    with torch.inference_mode():
        for run in runs:
            with swapped(model, in_model(tensors), device):
                before = run(model).double()
            with swapped(model, in_model(shuffled), device):
                after = run(model).double()
            change = float((after - before).abs().max() / before.abs().max().clamp_min(1e-12))
            if not change <= TOLERANCE:
                raise RecipeError(
                    f"permuting the specified groups changes the model's outputs (by {change:.2g} of the largest)",
                    "the spec misses an axis or ties the wrong ones: take groups out until this passes",
                )
            worst = max(worst, change)
    return worst
