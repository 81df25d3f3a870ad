"""Permutation groups of any network, found by watching it run on an example.

Every tensor carries a label an axis; each operation says which axes must move together: a linear layer ties its input
to its columns and opens new labels at its rows, a sum ties its terms (the residual streams of a ResNet), BatchNorm ties
scale, shift and running statistics to the channels. **What an operation does not say it pins**: an unknown operation,
the network's outputs and a sliced channel keep their order, so that a network which is not understood loses freedom,
never its function. Control flow is followed as the example runs it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..evaluation.scoring import state_slots
from .axes import Label, Labelling, Labels
from .operations import rule_of, takes
from .spec import Group, Site, Spec

# Read no values. `__get__` is shape, dtype, device and the like; where it gives a tensor it is an unknown operation.
_HARMLESS = {
    "size", "dim", "ndimension", "numel", "stride", "is_floating_point", "is_complex", "is_contiguous",
    "element_size", "get_device", "__len__", "__get__",
}  # fmt: skip


def trace_spec(
    model: nn.Module, runs: Iterable[Callable[[nn.Module], Tensor]], names: Mapping[str, str] | None = None
) -> Spec:
    """The groups of ``model`` under all ``runs``, each a function that runs the model on an example.

    ``names``: the model's parameter names -> the names to use, where a checkpoint stores others.
    """
    tracer = _Tracer(model)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for run in runs:
                with tracer:
                    outputs = run(model)
                tracer.end_of_run(outputs)
    finally:
        model.train(training)
    return Spec(tuple(_groups(tracer, names or {})))


def _groups(tracer: _Tracer, names: Mapping[str, str]) -> Iterator[Group]:
    classes: dict[int, list[Site]] = defaultdict(list)
    for name, labels in tracer.parameters.items():
        for axis, label in enumerate(labels):
            if label is not None and not tracer.labels.axes.fixed(label):
                root = tracer.labels.axes.find(label)
                statistics = name.rpartition(".")[2] in ("running_mean", "running_var")
                site = Site(names.get(name, name), axis, width=root.width, matched=not statistics)
                classes[root.node].append(site)
    for node, sites in classes.items():
        # One site alone was never tied to a reader: an unused parameter, or units that are only summed up.
        if sum(site.matched for site in sites) > 1 and tracer.labels.axes.size(Label(node)) > 1:
            yield Group(_title(sites), tracer.labels.axes.size(Label(node)), tuple(sites))


def _title(sites: list[Site]) -> str:
    """A group is called after the first weight whose outputs it orders: no two groups share those."""
    weights = [s for s in sites if s.axis == 0 and s.matched]
    first = (weights or sites)[0]
    return first.tensor.removesuffix(".weight") + ("" if first.axis == 0 else f".axis{first.axis}")


class _Tracer(TorchFunctionMode):
    """Follows labels through the operations of a run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.labels = Labelling()
        self.parameters: dict[str, Labels] = {}
        seen: set[int] = set()
        for name, tensor in state_slots(model).items():
            if id(tensor) not in seen:  # a tied parameter counts under its first name
                seen.add(id(tensor))
                self.parameters[name] = self.labels.open(tensor)

    def end_of_run(self, outputs: Any) -> None:
        """The order of what comes out is the order of the classes: pin it, and forget the run's tensors."""
        self.labels.pin_all(outputs)
        self.labels.forget()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # In-place operations may change a shape: look before.
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else None for a in args]
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if not isinstance(result, Tensor):
            if name not in _HARMLESS:
                self.labels.pin_all([args, kwargs, result])
            return result
        rule = rule_of(name)
        found = rule(self.labels, result, shapes, *args, **kwargs) if rule and takes(rule, args, kwargs) else None
        if found is None:
            self.labels.pin_all([args, kwargs, result])
            found = [None] * result.dim()
        self.labels.set(result, found)
        return result
