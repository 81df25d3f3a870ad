"""What each operation of a network says about the axes of its inputs and its result.

A rule ties what has to move together and gives the labels of the result. An operation without a rule, or one called in
a way that its rule does not know, is not followed: its tensors are pinned.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import Tensor

from .axes import Label, Labelling, Labels, reshaped

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

Rule = Callable[..., Labels | None]
"""A rule gives the result's labels, having tied what must be tied; None: it does not apply, pin everything."""


def rule_of(name: str) -> Rule | None:
    if name in _ELEMENTWISE:
        return _elementwise
    if name in _BINARY:
        return _binary
    if name in _RESHAPES:
        return _reshape
    if name.rstrip("123d") in _POOLS:
        return _POOL_OF.get(name[-2:], _pool)
    return _RULES.get(name)


def takes(rule: Rule, args: Any, kwargs: Any) -> bool:
    """Whether an operation is called as its rule knows it."""
    try:
        given = signature(rule).bind(None, None, None, *args, **kwargs).arguments
    except TypeError:
        return False
    return all(isinstance(given[key], Tensor) for key in ("x", "input", "weight") if given.get(key) is not None)


def _elementwise(t: Labelling, out: Tensor, shapes: Any, x: Tensor, *args: Any, **kwargs: Any) -> Labels | None:
    return t.of(x) if out.shape == shapes[0] and not any(isinstance(a, Tensor) for a in kwargs.values()) else None


def _binary(t: Labelling, out: Tensor, shapes: Any, *args: Any, **kwargs: Any) -> Labels | None:
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


def _reshape(t: Labelling, out: Tensor, shapes: Any, x: Tensor, *args: Any, **kwargs: Any) -> Labels | None:
    return reshaped(t.axes, t.of(x), shapes[0], tuple(out.shape))


def _pool(t: Labelling, out: Tensor, shapes: Any, x: Tensor, *args: Any, **kwargs: Any) -> Labels | None:
    """``interpolate`` takes batches only; pools take single inputs too, whose second axis is no channel."""
    if x.dim() < 3 or x.dim() != out.dim() or x.shape[:2] != out.shape[:2]:
        return None
    for label in t.of(x)[2:]:
        t.axes.pin(label)
    return [*t.of(x)[:2], *[None] * (x.dim() - 2)]


def _pool_over(axes: int) -> Rule:
    def rule(t: Labelling, out: Tensor, shapes: Any, x: Tensor, *args: Any, **kwargs: Any) -> Labels | None:
        return _pool(t, out, shapes, x) if x.dim() == axes + 2 else None

    return rule


_POOL_OF = {f"{axes}d": _pool_over(axes) for axes in (1, 2, 3)}


def _linear(
    t: Labelling, out: Tensor, shapes: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Labels | None:
    t.tie(weight, 1, t.of(input)[-1])
    rows = t.of(weight)[0]
    t.tie(bias, 0, rows)
    return [*t.of(input)[:-1], rows]


def _addmm(t: Labelling, out: Tensor, shapes: Any, bias: Tensor, x: Tensor, weight: Tensor, **kwargs: Any) -> Any:
    """transformers' Conv1D: weights lie (in, out)."""
    t.tie(weight, 0, t.of(x)[-1])
    columns = t.of(weight)[1]
    if bias.dim() != 1:
        return None
    t.tie(bias, 0, columns)
    return [t.of(x)[0], columns]


def _matmul(t: Labelling, out: Tensor, shapes: Any, a: Tensor, b: Tensor) -> Labels | None:
    if a.dim() < 2 or b.dim() < 2:
        return None
    t.axes.join(t.of(a)[-1], t.of(b)[-2])
    labels: Labels = []
    for back in range(-out.dim(), -2):
        here = [t.of(x)[back] for x in (a, b) if x.dim() >= -back and x.shape[back] == out.shape[back] != 1]
        labels.append(t.axes.join(here[0], here[1]) if len(here) == 2 else here[0] if here else None)
    return [*labels, t.of(a)[-2], t.of(b)[-1]]


def _convolution(
    t: Labelling,
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
    t: Labelling, out: Tensor, shapes: Any, input: Tensor, mean: Any, var: Any, weight: Any = None, bias: Any = None,
    *rest: Any, **kwargs: Any,
) -> Labels | None:  # fmt: skip
    for tensor in (mean, var, weight, bias):
        t.tie(tensor, 0, t.of(input)[1])
    return t.of(input)


def _layer_norm(
    t: Labelling, out: Tensor, shapes: Any, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None,
    *rest: Any, **kwargs: Any,
) -> Labels | None:  # fmt: skip
    for tensor in (weight, bias):
        if tensor is not None:
            for back in range(-tensor.dim(), 0):
                t.tie(tensor, back, t.of(input)[back])
    return t.of(input)


def _group_norm(
    t: Labelling, out: Tensor, shapes: Any, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None,
    *rest: Any, **kwargs: Any,
) -> Labels | None:  # fmt: skip
    if num_groups not in (1, input.shape[1]):
        return None
    for tensor in (weight, bias):
        t.tie(tensor, 0, t.of(input)[1])
    return t.of(input)


def _embedding(t: Labelling, out: Tensor, shapes: Any, input: Tensor, weight: Tensor, *rest: Any, **kwargs: Any) -> Any:
    t.pin(weight, 0)
    return [*[None] * input.dim(), t.of(weight)[1]]


def _reduce(t: Labelling, out: Tensor, shapes: Any, x: Tensor, *args: Any, **kwargs: Any) -> Labels | None:
    """Means and sums do not see the order of what they run over."""
    dim = kwargs.get("dim", args[0] if args else None)
    dims = range(x.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % x.dim() for d in dims}
    if out.dim() == x.dim():
        return [None if d in gone else label for d, label in enumerate(t.of(x))]
    return [label for d, label in enumerate(t.of(x)) if d not in gone]


def _permute(t: Labelling, out: Tensor, shapes: Any, x: Tensor, *dims: Any, **kwargs: Any) -> Labels | None:
    order = dims[0] if dims and not isinstance(dims[0], int) else dims
    return [t.of(x)[d] for d in order] if order and not kwargs else None


def _transpose(t: Labelling, out: Tensor, shapes: Any, x: Tensor, *dims: Any, **kwargs: Any) -> Labels | None:
    if kwargs or len(dims) not in (0, 2):
        return None
    labels = list(t.of(x))
    a, b = dims or (0, 1)
    labels[a], labels[b] = labels[b], labels[a]
    return labels


def _expand(t: Labelling, out: Tensor, shapes: Any, x: Tensor, *args: Any, **kwargs: Any) -> Labels | None:
    own = [label if out.shape[k - x.dim()] == x.shape[k] else None for k, label in enumerate(t.of(x))]
    return [*[None] * (out.dim() - x.dim()), *own]


def _cat(t: Labelling, out: Tensor, shapes: Any, tensors: Any, dim: int = 0) -> Labels | None:
    if any(x.dim() != out.dim() for x in tensors):  # torch takes an empty vector with anything
        return None
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


def _getitem(t: Labelling, out: Tensor, shapes: Any, x: Tensor, key: Any) -> Labels | None:
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
