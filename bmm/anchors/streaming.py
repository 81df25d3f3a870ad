"""Runs a kernel over a whole model, tensor by tensor: the base and T experts are never in memory together."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import MergeError
from ..linalg import require_finite
from ..notation import StateDict, Tensors
from .anchor import Anchor, Context, KnobValue, matrix_shape
from .inputs import Inputs, Progress, first_names, require_agreement, shared_storage
from .registry import get, resolve_knobs


def _narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype``; values beyond its range become its largest ones, not infinities."""
    if torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return tensor.to(dtype)
    limits = torch.finfo(dtype)
    return tensor.clamp(limits.min, limits.max).to(dtype)


def _grams_of(
    name: str, shape: tuple[int, int], stack: Sequence[Tensor], experts: int, device: torch.device
) -> tuple[Tensor, ...]:
    """The T Grams (i, i) of a weight (o, i), checked; the last row and column of a joined bias are cut off."""
    width = shape[1]
    if len(stack) != experts:
        raise MergeError(f"{name} has {len(stack)} Grams for {experts} experts", "collect one Gram an expert")
    for gram in stack:
        if tuple(gram.shape) not in ((width, width), (width + 1, width + 1)):
            raise MergeError(
                f"{name}: a Gram is {tuple(gram.shape)}, the weight has {width} inputs",
                f"it must be ({width}, {width}), one more with a joined bias; name (in, out) weights in `transposed`",
            )
    return tuple(gram[:width, :width].to(device) for gram in stack)


def _merge_tensor(
    anchor: Anchor,
    knobs: Mapping[str, KnobValue],
    context: Context,
    taus: Tensor,
    grams: Mapping[str, Sequence[Tensor]],
    transposed: bool,
) -> Tensor:
    """The merged task vector (*shape) of one tensor, linear knob included."""
    inner = {knob.name: knobs[knob.name] for knob in anchor.knobs if not knob.linear}
    factor = float(knobs[anchor.linear.name]) if anchor.linear else 1.0
    if not anchor.matrices:
        return factor * anchor.kernel(taus, context, **inner)

    w0, name = context.w0, context.name
    if transposed and w0.dim() != 2:
        raise MergeError(f"{name} is named as transposed but has {w0.dim()} dimensions", "name (in, out) weights only")
    if transposed:
        w0, taus = w0.mT, taus.mT
    shape = matrix_shape(tuple(w0.shape))
    stack = None
    if "grams" in anchor.needs and name in grams and w0.dim() >= 2:
        shape = w0.shape[0], w0[0].numel()  # a Gram says that this is a weight: a leading 1 is one output
        stack = _grams_of(name, shape, grams[name], len(taus), taus.device)
    if shape is None:
        return factor * taus.mean(0)
    flat = taus.reshape(-1, *shape)  # (T, o, i)
    d = anchor.kernel(flat, Context(name, w0.reshape(shape), stack, context.state), **inner)  # (o, i)
    d = factor * d.reshape(w0.shape)
    return d.mT if transposed else d


def merge_stream(
    name: str,
    base: Tensors,
    experts: Sequence[Tensors],
    *,
    grams: Mapping[str, Sequence[Tensor]] | None = None,
    transposed: Collection[str] = (),
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    **knobs: Any,
) -> Iterator[tuple[str, Tensor]]:
    """Merge ``experts`` into ``base`` by the method ``name``, yielding (parameter name, merged tensor) in base order.

    Mappings may read from disk on access: every tensor is read once for merging, and once more for each pass of a
    method's scan (TIES and its kin make three, one at density 1). No more than one tensor of the T experts is held.

    Parameters
    ----------
    grams : parameter name -> T Grams (i, i) of the inputs of that weight; (i + 1, i + 1) where a bias joins, of which
        the weight's block is used. Read by methods that need them (``Anchor.needs``); a weight without is averaged.
    transposed : names of weights stored (in, out), as transformers' ``Conv1D`` does.
    device : where the arithmetic runs; results lie where the base's tensors do.
    dtype : of the merged floating tensors, the base's by default. Values beyond its range are clamped to it.
    progress : see `Progress`.
    knobs : the method's own hyperparameters, see ``get(name).knobs``.

    Tensors of integers or booleans are the base's. Arithmetic is in float32 or float64, whatever the storage.

    Raises `MergeError`: at once for an unknown method, knob or value, missing Grams, names that differ, and shapes or
    kinds that differ between models in memory; when a tensor is read for shapes and kinds of others, NaN and Inf.
    """
    anchor = get(name)
    values = resolve_knobs(anchor, knobs)
    require_agreement(base, experts)
    names = set(base)  # `key in base` would read the tensor of a lazy mapping
    if unknown := set(transposed) - names:
        raise MergeError(
            f"transposed names {first_names(unknown)}, which the base lacks", "name parameters of the base"
        )
    if dtype is not None and not dtype.is_floating_point:
        raise MergeError(f"dtype is {dtype}", "ask for a floating dtype: float32, float16, bfloat16")
    if anchor.needs and names.isdisjoint(grams or ()):
        raise MergeError(
            f"anchor {name} needs the Grams of the modules' inputs",
            "collect them first (bmm gram) and give them as grams={parameter name: [T Grams]}",
        )
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise MergeError(f"device {device!r} cannot be used", "use cpu, or check that torch sees the device") from error
    tied = shared_storage(base, experts)
    inputs = Inputs({key: base[key] for key in base if key not in tied} if tied else base, experts, place, progress)
    return _run(anchor, values, inputs, grams or {}, frozenset(transposed), dtype, base, tied)


def _run(
    anchor: Anchor,
    knobs: dict[str, KnobValue],
    inputs: Inputs,
    grams: Mapping[str, Sequence[Tensor]],
    transposed: frozenset[str],
    dtype: torch.dtype | None,
    base: Tensors,
    tied: dict[str, str],
) -> Iterator[tuple[str, Tensor]]:
    state = anchor.scan(inputs, knobs) if anchor.scan else None
    shared: dict[str, Tensor] = {}
    targets = set(tied.values())
    for done, name in enumerate(base, 1):
        if name in tied:
            merged = shared[tied[name]]
        else:
            tensors = inputs.read(name)
            if isinstance(tensors, Tensor):
                merged = tensors.clone()
            else:
                stored, w0, taus = tensors
                if stored.numel():
                    context = Context(name, w0, state=state)
                    d = _merge_tensor(anchor, knobs, context, taus, grams, name in transposed)
                    w0 = (w0 + d).contiguous()
                    require_finite(f"{name}, merged by {anchor.name},", w0)
                merged = _narrow(w0, dtype or stored.dtype).to(stored.device)
            if name in targets:
                shared[name] = merged
        yield name, merged
        if inputs.progress:
            inputs.progress("merge", done, len(base))


def merge(
    name: str,
    base: Tensors,
    experts: Sequence[Tensors],
    *,
    grams: Mapping[str, Sequence[Tensor]] | None = None,
    transposed: Collection[str] = (),
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    **knobs: Any,
) -> StateDict:
    """The merged model, all of it in memory; arguments, guarantees and errors are those of `merge_stream`.

    >>> merged = merge("ties", base.state_dict(), [a.state_dict(), b.state_dict()], density=0.3)
    """
    stream = merge_stream(
        name,
        base,
        experts,
        grams=grams,
        transposed=transposed,
        device=device,
        dtype=dtype,
        progress=progress,
        **knobs,
    )
    return dict(stream)
