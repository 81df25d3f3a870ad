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
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..evaluation.scoring import state_slots
from .axes import Axes, Label, Labels, reshaped
from .spec import Group, Site, Spec

_ELEMENTWISE = {
    "relu", "relu_", "gelu", "silu", "silu_", "tanh", "tanh_", "sigmoid", "sigmoid_", "elu", "selu", "celu",
    "leaky_relu", "leaky_relu_", "relu6", "hardtanh", "hardswish", "hardsigmoid", "mish", "softplus", "softsign",
    "logsigmoid", "dropout", "dropout1d", "dropout2d", "alpha_dropout", "feature_dropout", "contiguous", "clone",
    "detach", "to", "type", "float", "double", "half", "bfloat16", "exp", "log", "abs", "neg", "sqrt", "rsqrt",
    "square", "reciprocal", "sin", "cos", "erf", "clamp", "clip", "softmax", "log_softmax", "__neg__",
}  # fmt: skip
_BINARY = {
    "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "true_divide", "pow", "maximum", "minimum", "__add__",
    "__iadd__", "__radd__", "__sub__", "__isub__", "__rsub__", "__mul__", "__imul__", "__rmul__", "__truediv__",
    "__itruediv__", "__rtruediv__", "__pow__", "lerp", "where",
}  # fmt: skip
_RESHAPES = {
    "flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten",
}  # fmt: skip
_POOLS = {
    "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "interpolate",
}  # fmt: skip
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
            if label is not None and not tracer.axes.fixed(label):
                root = tracer.axes.find(label)
                statistics = name.rpartition(".")[2] in ("running_mean", "running_var")
                site = Site(names.get(name, name), axis, width=root.width, matched=not statistics)
                classes[root.node].append(site)
    for node, sites in classes.items():
        # One site alone was never tied to a reader: an unused parameter, or units that are only summed up.
        if sum(site.matched for site in sites) > 1 and tracer.axes.size(Label(node)) > 1:
            yield Group(_title(sites), tracer.axes.size(Label(node)), tuple(sites))


def _title(sites: list[Site]) -> str:
    """A group is called after the first weight whose outputs it orders: no two groups share those."""
    weights = [s for s in sites if s.axis == 0 and s.matched]
    first = (weights or sites)[0]
    return first.tensor.removesuffix(".weight") + ("" if first.axis == 0 else f".axis{first.axis}")


class _Tracer(TorchFunctionMode):
    """Follows labels through the operations of a run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.axes = Axes()
        self.parameters: dict[str, Labels] = {}
        self._known: dict[int, Labels] = {}
        self._alive: list[Tensor] = []  # ids are unique only among the living
        for name, tensor in state_slots(model).items():
            if id(tensor) not in self._known:  # a tied parameter counts under its first name
                labels: Labels = [self.axes.new(n) if n > 1 else None for n in tensor.shape]
                self._known[id(tensor)] = labels
                self.parameters[name] = labels
        self._permanent = dict(self._known)

    def end_of_run(self, outputs: Any) -> None:
        """The order of what comes out is the order of the classes: pin it, and forget the run's tensors."""
        self._pin_all(outputs)
        self._known, self._alive = dict(self._permanent), []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # In-place operations may change a shape: look before.
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else None for a in args]
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if not isinstance(result, Tensor):
            if name not in _HARMLESS:
                self._pin_all([args, kwargs, result])
            return result
        rule = _rule(name)
        labels = rule(self, result, shapes, *args, **kwargs) if rule and _takes(rule, args, kwargs) else None
        if labels is None:
            self._pin_all([args, kwargs, result])
            labels = [None] * result.dim()
        self._alive.append(result)
        if id(result) not in self._permanent:
            self._known[id(result)] = labels
        return result

    def of(self, tensor: Any) -> Labels:
        return self._known.get(id(tensor), [None] * tensor.dim())

    def _pin_all(self, value: Any) -> None:
        if isinstance(value, Tensor):
            for label in self._known.get(id(value), ()):
                self.axes.pin(label)
        elif isinstance(value, Mapping):
            self._pin_all(list(value.values()))
        elif isinstance(value, list | tuple):
            for item in value:
                self._pin_all(item)

    def tie(self, tensor: Tensor | None, axis: int, label: Label | None) -> None:
        if tensor is not None:
            self.axes.join(self.of(tensor)[axis], label)

    def pin(self, tensor: Tensor, *axes: int) -> None:
        for axis in axes:
            self.axes.pin(self.of(tensor)[axis])


Rule = Callable[..., Labels | None]
"""A rule gives the result's labels, having tied what must be tied; None: it does not apply, pin everything."""


def _rule(name: str) -> Rule | None:
    if name in _ELEMENTWISE:
        return _elementwise
    if name in _BINARY:
        return _binary
    if name in _RESHAPES:
        return _reshape
    if name.rstrip("123d") in _POOLS:
        return _pool
    return _RULES.get(name)


def _takes(rule: Rule, args: Any, kwargs: Any) -> bool:
    """Whether an operation is called as its rule knows it."""
    try:
        given = signature(rule).bind(None, None, None, *args, **kwargs).arguments
    except TypeError:
        return False
    return all(isinstance(given[key], Tensor) for key in ("x", "input", "weight") if given.get(key) is not None)


def _elementwise(t: _Tracer, out: Tensor, shapes: Any, x: Tensor, *args: Any, **kwargs: Any) -> Labels | None:
    return t.of(x) if out.shape == shapes[0] and not any(isinstance(a, Tensor) for a in kwargs.values()) else None


def _binary(t: _Tracer, out: Tensor, shapes: Any, *args: Any, **kwargs: Any) -> Labels | None:
    """Aligned from the right; an axis of length 1 is broadcast and says nothing."""
    if any(isinstance(v, Tensor) for v in kwargs.values()):
        return None
    tensors = [a for a in args if isinstance(a, Tensor)]
    labels: Labels = []
    for axis in range(out.dim()):
        back = axis - out.dim()
        here = [t.of(x)[back] for x in tensors if x.dim() >= -back and x.shape[back] == out.shape[axis] != 1]
        first = here[0] if here else None
        for other in here[1:]:
            first = t.axes.join(first, other)
        labels.append(first)
    return labels


def _reshape(t: _Tracer, out: Tensor, shapes: Any, x: Tensor, *args: Any, **kwargs: Any) -> Labels | None:
    return reshaped(t.axes, t.of(x), shapes[0], tuple(out.shape))


def _pool(t: _Tracer, out: Tensor, shapes: Any, x: Tensor, *args: Any, **kwargs: Any) -> Labels | None:
    if x.dim() < 3 or x.dim() != out.dim() or x.shape[:2] != out.shape[:2]:
        return None
    for label in t.of(x)[2:]:
        t.axes.pin(label)
    return [*t.of(x)[:2], *[None] * (x.dim() - 2)]


def _linear(
    t: _Tracer, out: Tensor, shapes: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Labels | None:
    t.tie(weight, 1, t.of(input)[-1])
    rows = t.of(weight)[0]
    t.tie(bias, 0, rows)
    return [*t.of(input)[:-1], rows]


def _addmm(t: _Tracer, out: Tensor, shapes: Any, bias: Tensor, x: Tensor, weight: Tensor, **kwargs: Any) -> Any:
    """transformers' Conv1D: weights lie (in, out)."""
    t.tie(weight, 0, t.of(x)[-1])
    columns = t.of(weight)[1]
    if bias.dim() != 1:
        return None
    t.tie(bias, 0, columns)
    return [t.of(x)[0], columns]


def _matmul(t: _Tracer, out: Tensor, shapes: Any, a: Tensor, b: Tensor) -> Labels | None:
    if a.dim() < 2 or b.dim() < 2:
        return None
    t.axes.join(t.of(a)[-1], t.of(b)[-2])
    labels: Labels = []
    for back in range(-out.dim(), -2):
        here = [t.of(x)[back] for x in (a, b) if x.dim() >= -back and x.shape[back] == out.shape[back] != 1]
        labels.append(t.axes.join(here[0], here[1]) if len(here) == 2 else here[0] if here else None)
    return [*labels, t.of(a)[-2], t.of(b)[-1]]


def _convolution(
    t: _Tracer,
    out: Tensor,
    shapes: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Labels | None:
    if input.dim() != weight.dim():
        return None
    t.pin(weight, *range(2, weight.dim()))
    channels = t.of(input)[1]
    if groups == 1:
        t.tie(weight, 1, channels)
        rows = t.of(weight)[0]
    elif groups == weight.shape[0] == input.shape[1]:  # depthwise: each channel on its own
        rows = t.axes.join(t.of(weight)[0], channels)
    else:
        return None
    t.tie(bias, 0, rows)
    return [t.of(input)[0], rows, *[None] * (out.dim() - 2)]


def _batch_norm(
    t: _Tracer, out: Tensor, shapes: Any, input: Tensor, mean: Any, var: Any, weight: Any = None, bias: Any = None,
    *rest: Any, **kwargs: Any,
) -> Labels | None:  # fmt: skip
    for tensor in (mean, var, weight, bias):
        t.tie(tensor, 0, t.of(input)[1])
    return t.of(input)


def _layer_norm(
    t: _Tracer, out: Tensor, shapes: Any, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None,
    *rest: Any, **kwargs: Any,
) -> Labels | None:  # fmt: skip
    for tensor in (weight, bias):
        if tensor is not None:
            for back in range(-tensor.dim(), 0):
                t.tie(tensor, back, t.of(input)[back])
    return t.of(input)


def _group_norm(
    t: _Tracer, out: Tensor, shapes: Any, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None,
    *rest: Any, **kwargs: Any,
) -> Labels | None:  # fmt: skip
    if num_groups not in (1, input.shape[1]):
        return None
    for tensor in (weight, bias):
        t.tie(tensor, 0, t.of(input)[1])
    return t.of(input)


def _embedding(t: _Tracer, out: Tensor, shapes: Any, input: Tensor, weight: Tensor, *rest: Any, **kwargs: Any) -> Any:
    t.pin(weight, 0)
    return [*[None] * input.dim(), t.of(weight)[1]]


def _reduce(t: _Tracer, out: Tensor, shapes: Any, x: Tensor, *args: Any, **kwargs: Any) -> Labels | None:
    """Means and sums do not see the order of what they run over."""
    dim = kwargs.get("dim", args[0] if args else None)
    dims = range(x.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % x.dim() for d in dims}
    if out.dim() == x.dim():
        return [None if d in gone else label for d, label in enumerate(t.of(x))]
    return [label for d, label in enumerate(t.of(x)) if d not in gone]


def _permute(t: _Tracer, out: Tensor, shapes: Any, x: Tensor, *dims: Any, **kwargs: Any) -> Labels | None:
    order = dims[0] if dims and not isinstance(dims[0], int) else dims
    return [t.of(x)[d] for d in order] if order and not kwargs else None


def _transpose(t: _Tracer, out: Tensor, shapes: Any, x: Tensor, *dims: Any, **kwargs: Any) -> Labels | None:
    if kwargs or len(dims) not in (0, 2):
        return None
    labels = list(t.of(x))
    a, b = dims or (0, 1)
    labels[a], labels[b] = labels[b], labels[a]
    return labels


def _expand(t: _Tracer, out: Tensor, shapes: Any, x: Tensor, *args: Any, **kwargs: Any) -> Labels | None:
    own = [label if out.shape[k - x.dim()] == x.shape[k] else None for k, label in enumerate(t.of(x))]
    return [*[None] * (out.dim() - x.dim()), *own]


def _cat(t: _Tracer, out: Tensor, shapes: Any, tensors: Any, dim: int = 0) -> Labels | None:
    labels: Labels = []
    for axis in range(out.dim()):
        here = [t.of(x)[axis] for x in tensors]
        first = here[0]
        for other in here[1:]:
            first = t.axes.join(first, other)
        if axis == dim % out.dim():
            for label in here:
                t.axes.pin(label)
            first = None
        labels.append(first)
    return labels


def _getitem(t: _Tracer, out: Tensor, shapes: Any, x: Tensor, key: Any) -> Labels | None:
    """Whole axes stay; a number or a part of an axis fixes its order."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if not all(isinstance(k, int | slice) or k is None or k is Ellipsis for k in keys):
        return None
    missing = x.dim() - sum(isinstance(k, int | slice) for k in keys)
    at = keys.index(Ellipsis) if Ellipsis in keys else len(keys)
    keys[at : at + 1] = [slice(None)] * missing
    own, labels = iter(t.of(x)), list[Label | None]()
    for k in keys:
        label = None if k is None else next(own)
        if k == slice(None):
            labels.append(label)
            continue
        t.axes.pin(label)
        if not isinstance(k, int):
            labels.append(None)
    return labels


_RULES: dict[str, Rule] = {
    "linear": _linear, "addmm": _addmm, "matmul": _matmul, "bmm": _matmul, "__matmul__": _matmul, "mm": _matmul,
    "conv1d": _convolution, "conv2d": _convolution, "conv3d": _convolution,
    "batch_norm": _batch_norm, "layer_norm": _layer_norm, "rms_norm": _layer_norm, "group_norm": _group_norm,
    "embedding": _embedding, "mean": _reduce, "sum": _reduce,
    "permute": _permute, "transpose": _transpose, "t": _transpose, "swapaxes": _transpose,
    "expand": _expand, "expand_as": _expand, "cat": _cat, "concat": _cat, "__getitem__": _getitem,
}  # fmt: skip
