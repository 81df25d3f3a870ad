"""Runs a kernel over a whole model, tensor by tensor: the base and T experts are never in memory together."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import MergeError
from ..groups import depth_of, relative_depths
from ..linalg import largest, require_finite
from ..notation import StateDict, Tensors
from .anchor import NEEDS, Anchor, Context, KnobValue, Whole, matrix_shape, weighted_mean
from .inputs import Inputs, Progress, first_names, require_agreement, shared_storage
from .lines import profile
from .measured import SOURCES, Statistics, fisher_of, grams_of
from .registry import get, resolve_knobs
from .resources import keep_pages, one_thread


def narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype``; values beyond its range become its largest ones, not infinities."""
    limits = torch.finfo(dtype)
    fits = limits.max >= torch.finfo(tensor.dtype).max
    return tensor.to(dtype) if fits else tensor.clamp(limits.min, limits.max).to(dtype)


def _store(result: Tensor, into: Tensor, label: str) -> None:
    """Copy a merged piece (*shape) ``into`` its place (n,) as `narrow` would; `MergeError` for NaN and Inf."""
    extreme = largest(result)
    if not math.isfinite(extreme):
        require_finite(label, result)
    limit = torch.finfo(into.dtype).max
    into.copy_((result.clamp(-limit, limit) if extreme > limit else result).reshape(-1))


def checked_weights(anchor: Anchor, given: Sequence[float] | None, experts: int) -> Tensor:
    """The task weights (T,), checked against what the method takes."""
    if given is None:
        return torch.ones(experts)
    weights = torch.tensor([float(a) for a in given], dtype=torch.float64)  # (T,)
    if len(weights) != experts:
        raise MergeError(f"{len(weights)} task weights for {experts} experts", "give one weight an expert")
    if not torch.isfinite(weights).all() or not weights.any():
        raise MergeError(f"task weights {list(given)}", "they are finite numbers, and not all of them 0")
    if bool((weights == 1).all()):
        return torch.ones(experts)
    if not anchor.weights:
        raise MergeError(f"anchor {anchor.name} takes no task weights", "drop them, or choose another method")
    if anchor.weights == "positive" and bool((weights < 0).any()):
        raise MergeError(
            f"anchor {anchor.name} takes no negative task weight",
            "task_arithmetic and ties do, for forgetting and for analogies",
        )
    return weights


def _require_count(anchor: Anchor, experts: int) -> None:
    fewest, most = anchor.experts
    if experts < fewest or (most is not None and experts > most):
        limit = f"exactly {fewest}" if fewest == most else f"at least {fewest}" if most is None else f"at most {most}"
        raise MergeError(
            f"anchor {anchor.name} takes {limit} experts, not {experts}", anchor.when or "choose another method"
        )


@dataclass(frozen=True)
class Job:
    """One merge: the method with its knobs, what it reads, what it knows."""

    anchor: Anchor
    knobs: Mapping[str, KnobValue]
    inputs: Inputs
    weights: Tensor  # (T,), none of them 0
    kept: Sequence[int]  # the experts these are, of the `count` that were given
    count: int
    statistics: Statistics
    transposed: frozenset[str]
    dtype: torch.dtype | None

    @property
    def scale(self) -> float:
        """The value of the method's linear knob."""
        return float(self.knobs[self.anchor.linear.name]) if self.anchor.linear else 1.0

    def merge(self, context: Context, taus: Tensor) -> Tensor:
        """The merged task vector (*shape) of one tensor, without the factor of the linear knob."""
        anchor = self.anchor
        own = (anchor.wrapped or anchor).knobs
        inner = {knob.name: self.knobs[knob.name] for knob in own if not knob.linear}
        if not anchor.matrices:
            return anchor.kernel(taus, context, **inner)

        w0, name, transposed = context.w0, context.name, context.name in self.transposed
        if transposed and w0.dim() != 2:
            raise MergeError(
                f"{name} is named as transposed but has {w0.dim()} dimensions", "name (in, out) weights only"
            )
        if transposed:
            w0, taus = w0.mT, taus.mT
        shape = matrix_shape(tuple(w0.shape))
        stack = None
        if anchor.needs & {"grams", "sequential_grams"} and name in self.statistics.grams and w0.dim() >= 2:
            shape = w0.shape[0], w0[0].numel()  # a Gram says that this is a weight: a leading 1 is one output
            stack = grams_of(name, shape, self.statistics.grams[name], self.kept, self.count, taus.device)
        if shape is None:
            return anchor.others(taus, context) if anchor.others else weighted_mean(taus, context.weights)
        flat = taus.reshape(-1, *shape)  # (T, o, i)

        def as_matrix(fisher: Tensor | None) -> Tensor | None:
            turned = fisher.mT if fisher is not None and transposed else fisher
            return None if turned is None else turned.reshape(*turned.shape[: turned.dim() - w0.dim()], *shape)

        inside = replace(
            context,
            w0=w0.reshape(shape),
            grams=stack,
            fisher=as_matrix(context.fisher),
            base_fisher=as_matrix(context.base_fisher),
        )
        d = anchor.kernel(flat, inside, **inner).reshape(w0.shape)
        return d.mT if transposed else d

    def measured(self, name: str, stored: Tensor, state: Any) -> Any:
        """What the kernel is told of the tensor that is ``stored`` in the base: where that comes in pieces what
        `Anchor.measure` finds, else what the scan found."""
        if self.anchor.measure is None or not self.inputs.cuts(stored):
            return state
        parts = ((w0, taus) for _, w0, taus in self.inputs.parts(name, stored))
        return self.anchor.measure(parts, self.knobs, self.weights)

    def merged(self, name: str, stored: Tensor, depth: float, strength: float, state: Any) -> Tensor:
        """The merged tensor of the one that is ``stored`` in the base: w0 plus ``strength`` times what `merge` gives;
        a copy of the base's where it is not floating."""
        if stored.is_floating_point():
            place = "cpu" if stored.is_meta else stored.device
            merged = torch.empty(stored.shape, dtype=self.dtype or stored.dtype, device=place)
        else:
            merged = stored.clone(memory_format=torch.contiguous_format)
        with one_thread(self.anchor.elementwise):
            known = self.measured(name, stored, state)
            for where, w0, taus in self.inputs.parts(name, stored):
                found = (strength * self.merge(self.context(name, w0, depth, known), taus)).add_(w0)
                _store(found, merged.view(-1)[where], f"{name}, merged by {self.anchor.name},")
        return merged

    def context(self, name: str, w0: Tensor, depth: float, state: Any) -> Context:
        """What the kernel may look at for one tensor; Fishers are read here, one tensor at a time."""
        fishers, base_fisher = self.statistics.fisher, self.statistics.base_fisher
        fisher = None
        if "fisher" in self.anchor.needs | self.anchor.takes and fishers:
            fisher = torch.stack([fisher_of(name, w0, f) for f in fishers])  # (T, *shape)
        before = None
        if "base_fisher" in self.anchor.needs and base_fisher is not None:
            before = fisher_of(name, w0, base_fisher)
        return Context(name, w0, self.weights, None, fisher, before, depth, state)


def merge_stream(
    name: str,
    base: Tensors,
    experts: Sequence[Tensors],
    *,
    weights: Sequence[float] | None = None,
    grams: Mapping[str, Sequence[Tensor]] | None = None,
    fisher: Sequence[Tensors] = (),
    base_fisher: Tensors | None = None,
    score: Callable[[Tensors], float] | None = None,
    transposed: Collection[str] = (),
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    done: Collection[str] = (),
    **knobs: Any,
) -> Iterator[tuple[str, Tensor]]:
    """Merge ``experts`` into ``base`` by the method ``name``, yielding (parameter name, merged tensor) in base order.

    Mappings may read from disk on access: every tensor is read once for merging, and once more for each pass of a
    method's scan (TIES and its kin make three, one at density 1). No more than one tensor of the T experts is held.

    Parameters
    ----------
    weights : T task weights a_t, 1 by default; see ``Anchor.weights`` for what a method takes.
    grams, fisher, base_fisher, score : see `Statistics`; read by methods that need them (``Anchor.needs``). A weight
        without Grams is averaged, a parameter without Fisher counts as having one of 0.
    transposed : names of weights stored (in, out), as transformers' ``Conv1D`` does.
    device : where the arithmetic runs; results lie where the base's tensors do.
    dtype : of the merged floating tensors, the base's by default. Values beyond its range are clamped to it.
    progress : see `Progress`.
    done : names that are not wanted: their tensors are left out.
    knobs : the method's own hyperparameters, see ``get(name).knobs``.

    Tensors of integers or booleans are the base's. Arithmetic is in float32 or float64, whatever the storage.

    Raises `MergeError`: at once for an unknown method, knob or value, missing statistics, too few or many experts,
    weights the method does not take, names that differ, and shapes or kinds that differ between models in memory; when
    a tensor is read for shapes and kinds of others, NaN and Inf.
    """
    anchor = get(name)
    values = resolve_knobs(anchor, knobs)
    require_agreement(base, experts)
    _require_count(anchor, len(experts))
    count = len(experts)
    task_weights = checked_weights(anchor, weights, count)
    kept = task_weights.nonzero()[:, 0].tolist()  # a task of weight 0 is left out, whatever the method
    experts, task_weights = [experts[t] for t in kept], task_weights[kept]
    if fisher and len(fisher) != count:
        raise MergeError(f"{len(fisher)} Fishers for {count} experts", "collect one an expert")
    names = set(base)  # `key in base` would read the tensor of a lazy mapping
    if unknown := set(transposed) - names:
        raise MergeError(
            f"transposed names {first_names(unknown)}, which the base lacks", "name parameters of the base"
        )
    if dtype is not None and not dtype.is_floating_point:
        raise MergeError(f"dtype is {dtype}", "ask for a floating dtype: float32, float16, bfloat16")
    statistics = Statistics(grams or {}, [fisher[t] for t in kept] if fisher else (), base_fisher, score)
    for need in sorted(anchor.needs):
        if not statistics.has(need, names):
            raise MergeError(f"anchor {name} needs {NEEDS[need]}", SOURCES[need])
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise MergeError(f"device {device!r} cannot be used", "use cpu, or check that torch sees the device") from error
    tied = shared_storage(base, experts)
    inputs = Inputs(
        {key: base[key] for key in base if key not in tied} if tied else base,
        experts,
        place,
        progress,
        anchor.elementwise,
    )
    job = Job(anchor, values, inputs, task_weights.to(place), kept, count, statistics, frozenset(transposed), dtype)
    return _run(job, base, tied, frozenset(done) - set(tied.values()))


def _run(job: Job, base: Tensors, tied: dict[str, str], left_out: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
    anchor, inputs = job.anchor, job.inputs
    keep_pages()
    score = _with_ties(job.statistics.score, tied)
    whole = Whole(job.weights, inputs.base, inputs.experts, score, job.statistics.fisher)
    with one_thread(anchor.elementwise):
        state = anchor.scan(inputs, job.knobs, whole) if anchor.scan else None
    depths = relative_depths(base)
    factor = _depth_factor(job, depths, state)
    shared: dict[str, Tensor] = {}
    targets = set(tied.values())
    with inputs.staged(name for name in base if name not in left_out and name not in tied):
        for done, name in enumerate(base, 1):
            if name in left_out:
                continue
            if name in tied:
                merged = shared[tied[name]]
            else:
                merged = job.merged(name, inputs.stored(name), depths[name], job.scale * factor(name), state)
                if name in targets:
                    shared[name] = merged
            yield name, merged
            if inputs.progress:
                inputs.progress("merge", done, len(base))


def _depth_factor(job: Job, depths: Mapping[str, float], state: Any) -> Callable[[str], float]:
    """What a method under LiNeS multiplies each tensor's task vector by; 1 for every other method."""
    if job.anchor.wrapped is None:
        return lambda name: 1.0

    def merges() -> Iterator[tuple[Tensor, Tensor]]:
        for name, stored in job.inputs.tensors():
            known = job.measured(name, stored, state)
            for _, w0, taus in job.inputs.parts(name, stored):
                yield taus, job.merge(job.context(name, w0, depths[name], known), taus)

    found = profile(job.knobs, merges(), job.weights)
    return lambda name: found.factor(depths[name], depth_of(name) is not None)


def _with_ties(score: Callable[[Tensors], float] | None, tied: Mapping[str, str]) -> Callable[[Tensors], float] | None:
    """The score of a model whose tied tensors are given once: they are put back under each of their names."""
    if score is None or not tied:
        return score
    return lambda model: score({**model, **{name: model[first] for name, first in tied.items()}})


def merge(name: str, base: Tensors, experts: Sequence[Tensors], **options: Any) -> StateDict:
    """The merged model, all of it in memory; options, guarantees and errors are those of `merge_stream`.

    >>> merged = merge("ties", base.state_dict(), [a.state_dict(), b.state_dict()], density=0.3)
    """
    return dict(merge_stream(name, base, experts, **options))
