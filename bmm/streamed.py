"""BMM at one point, module by module: what a merge of a large model holds is one module's matrices, never the model.

`bmm.merging` decomposes every module once, for many trials. Here each is solved once, by a Cholesky factor of the
pooled Gram (or its decomposition, where the factor would not be safe: see `bmm.repool`), and forgotten. The tasks'
Grams are summed as they come, so that memory does not grow with T:

    base, anchor, one expert, target (o, i) and one task's Gram, pooled Gram, factor (i, i), all in float64.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .checkpoint import ModelPool
from .checkpoint.staging import Staging, all_on_disk, apart
from .errors import GramError, RecipeError
from .grams import TaskGrams
from .grams.spectrum import noise_level, task_weights
from .groups import search_groups
from .layouts import matrix, matrix_layouts
from .linalg import require_finite
from .merging import bias_of, task_parts
from .norms import PreparedNorm, prepare_norm
from .notation import StateDict, Tensors
from .records import Hyperparameters
from .repool import Mix, factorised, posterior_update, spectrum_of, task_scales
from .solver import check_scalars, from_target, join_bias, split_bias


@dataclass
class StreamedMerge:
    """What `PreparedModel.merge` gives at one point, as a stream of (name, float32 tensor).

    Arguments as `bmm.merging.prepare_model`. Raises `GramError` where Grams are missing or of the wrong shape.
    """

    pool: ModelPool
    task_grams: Sequence[TaskGrams] | None = None
    source: str = "data"
    gamma: float = 0.5
    weights: Sequence[float] | None = None
    normalise: str = "trace"
    bias: str = "joined"
    scheme: str = "depth"
    bands: int = 4
    overrides: dict[str, str] = field(default_factory=dict)
    transposed: Collection[str] = ()
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if self.source != "datafree" and not self.task_grams:
            raise GramError(f"Gram source {self.source!r} needs activation Grams", "collect them, or use datafree ones")
        data = self._data = self.task_grams if self.source != "datafree" else None
        self.layouts = matrix_layouts(self.pool, data, self.transposed)
        floating = set(self.pool.float_names)
        norms = sorted({n for g in data or () for n in g.norms if n in floating} - self.layouts.keys())
        self.layouts |= dict.fromkeys(norms, "norm")
        self._group_of = search_groups(self.layouts, self.scheme, self.bands, self.overrides)
        self._bias: dict[str, str] = {}
        for name, layout in self.layouts.items():
            if layout == "norm":
                found = next((g.norm_bias[name] for g in data or () if name in g.norm_bias), "")
            else:
                found = bias_of(name, data) if data and self.bias == "joined" else ""
            if found:
                self._bias[name] = found
        self._weight_of = {bias: name for name, bias in self._bias.items()}
        self._shared: tuple[object, Tensor, float] | None = None  # the last pooled Gram, its modules' key and its noise
        self._factors: dict[float, Tensor | None] = {}
        self._staging: Staging | None = None

    @property
    def groups(self) -> list[str]:
        """Search groups, one (lam, rho) pair each."""
        return list(dict.fromkeys(self._group_of.values()))

    def at(
        self, point: Hyperparameters, anchor: Iterable[tuple[str, Tensor]], done: Collection[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """The merged tensors, in the order in which those of ``anchor`` come; a bias comes with its weight.

        ``done`` are names that are not wanted, and that ``anchor`` may leave out.
        Raises `RecipeError` where a group has no hyperparameter, `MergeError` for values that are not finite.
        """
        if missing := [g for g in self.groups if g not in point.lam or g not in point.rho]:
            raise RecipeError(
                f"no hyperparameters for group {', '.join(missing)}", f"groups of this model: {', '.join(self.groups)}"
            )
        waiting: dict[str, Tensor] = {}
        with self._staged(point, done):
            for name, tensor in anchor:
                weight = self._weight_of.get(name, name)
                if weight not in self.layouts:
                    yield name, self._kept(name, tensor, point)
                    continue
                waiting[name] = tensor
                pair = self._pair(weight)
                if all(n in waiting for n in pair):
                    given = {n: waiting.pop(n) for n in pair}
                    if not set(pair) <= set(done):
                        yield from self._solved(weight, given, point).items()

    def _pair(self, weight: str) -> list[str]:
        """A weight, and the bias that is solved with it."""
        return [name for name in (weight, self._bias.get(weight, "")) if name]

    def _reads_experts(self, weight: str, point: Hyperparameters) -> bool:
        return self.layouts[weight] == "norm" or not math.isinf(point.lam[self._group_of[weight]])

    def _models(self, weight: str, point: Hyperparameters) -> Sequence[Tensors]:
        """Base and experts, as far as one module is concerned."""
        if self._staging is None or not self._reads_experts(weight, point):
            return [self.pool.base, *self.pool.experts]
        taken = {name: self._staging.take(name) for name in self._pair(weight)}
        return [{name: models[t].tensor for name, models in taken.items()} for t in range(len(self.pool) + 1)]

    @contextlib.contextmanager
    def _staged(self, point: Hyperparameters, done: Collection[str]) -> Iterator[None]:
        """Read the modules that are to be solved ahead, where the device computes meanwhile."""
        models, device = (self.pool.base, *self.pool.experts), torch.device(self.device)
        position = {name: number for number, name in enumerate(self.pool.names)}
        last = {max(self._pair(weight), key=position.__getitem__): weight for weight in self.layouts}
        weights = [last[name] for name in self.pool.names if name in last]
        wanted = [w for w in weights if self._reads_experts(w, point) and not set(self._pair(w)) <= set(done)]
        names = [name for weight in wanted for name in self._pair(weight)]
        if not apart(device) or not all_on_disk(models, names):
            yield
            return
        self._staging = Staging(models, ((name, None) for name in names), device)
        try:
            yield
        finally:
            self._staging.close()
            self._staging = None

    def _kept(self, name: str, anchor: Tensor, point: Hyperparameters) -> Tensor:
        """A tensor that no regression solves: the anchor's, its task vector times the point's anchor scale."""
        scale = 1.0 if point.anchor_scale is None else point.anchor_scale
        if scale == 1 or not anchor.is_floating_point():
            return anchor
        w0 = self.pool.base[name].to(anchor)
        return w0 + scale * (anchor - w0)

    def _solved(self, name: str, anchor: Tensors, point: Hyperparameters) -> StateDict:
        """A weight and its joined bias."""
        lam, rho = point.lam[self._group_of[name]], point.rho[self._group_of[name]]
        scale = 1.0 if point.anchor_scale is None else point.anchor_scale
        check_scalars(name, lam, rho, scale)
        models = self._models(name, point)
        w0, wa = self._joined(name, models[0]), self._joined(name, anchor)  # (o, i)
        require_finite(f"{name}: anchor", wa)
        mix = self._mix(point)
        if self.layouts[name] == "norm":
            merged = self._norm(name, w0, wa, mix, models[1:]).merge(lam, rho, scale)
        elif math.isinf(lam):
            merged = wa if rho * scale == 1 else w0 + rho * scale * (wa - w0)
        else:
            target, pooled, noise = self._evidence(name, w0, mix, models[1:])
            if lam not in self._factors:
                self._factors[lam] = factorised(pooled, noise, lam)
            factor = self._factors[lam]
            if factor is None:
                spectrum = spectrum_of(pooled, noise, self.normalise, name)
                merged = from_target(w0, wa, target, spectrum, name).merge(lam, rho, scale)
            else:
                merged = w0 + rho * posterior_update(target, scale * (wa - w0), lam, factor)
        out, bias = {}, self._bias.get(name, "")
        if bias:
            merged, found = split_bias(merged)
            out[bias] = found.float().reshape(self.pool.shape(bias))
        merged = merged.mT if self.layouts[name] == "conv1d" else merged
        return out | {name: merged.float().reshape(self.pool.shape(name))}

    def _joined(self, name: str, tensors: Tensors) -> Tensor:
        """A weight as (o, i) in float64, the bias that is solved with it joined."""
        weight = matrix(tensors[name].to(self.device, torch.float64), self.layouts[name])
        bias = self._bias.get(name, "")
        return join_bias(weight, tensors[bias].to(weight).flatten()) if bias else weight

    def _mix(self, point: Hyperparameters) -> Mix:
        given = [1.0] * len(self.pool) if self.weights is None else list(self.weights)
        weights = tuple(point.weights.get(t, w) for t, w in zip(self.pool.tasks, given, strict=True))
        return Mix(weights, self.gamma if point.gamma is None else point.gamma)

    def _evidence(self, name: str, w0: Tensor, mix: Mix, experts: Sequence[Tensors]) -> tuple[Tensor, Tensor, float]:
        """``sum_t a_t tau_t Gt`` (o, i), the pooled Gram (i, i) and its noise level.

        Modules that read the same input share the Gram and its factors: those of the last one are kept for the next.
        """
        data = self._data
        key: object = tuple(g.key_of.get(name, "") for g in data) if data and self.source == "data" else name
        if self._shared is None or self._shared[0] != key:
            self._shared, self._factors = None, {}  # before the next ones are made
        width, eps = w0.shape[-1], torch.finfo(torch.float64).eps
        target = torch.zeros_like(w0)
        pooled = w0.new_zeros(width, width) if self._shared is None else None
        for t, weight in enumerate(task_weights(mix.weights, len(self.pool), name)):
            tau = self._joined(name, experts[t]) - w0  # (o, i)
            require_finite(f"{name}: expert {self.pool.tasks[t]}", tau)
            parts = task_parts(
                name, tau, data[t] if data else None, self.source, name in self._bias, self.bias == "anchor", tau.dtype
            )
            traces = [float(part.diagonal().double().sum()) for part in parts]
            scales = task_scales(traces, mix.shares(len(parts)), weight, width, self.normalise)
            for part, factor in zip(parts, scales, strict=True):
                if factor > 0:
                    require_finite(f"{name}: Gram of {self.pool.tasks[t]}", part)
                    wide = part.to(w0)  # (i, i)
                    target.addmm_(tau, wide, alpha=factor)
                    if pooled is not None:
                        pooled.add_(wide, alpha=factor)
                        eps = max(eps, torch.finfo(part.dtype).eps)
        if pooled is not None:
            self._shared = key, pooled, noise_level(pooled, eps)
        assert self._shared is not None
        return target, self._shared[1], self._shared[2]

    def _norm(self, name: str, w0: Tensor, anchor: Tensor, mix: Mix, experts: Sequence[Tensors]) -> PreparedNorm:
        """A norm prepared; a task whose run never reached it contributes zero."""
        zero = torch.zeros(*w0.shape, w0.shape[1], dtype=torch.float64)
        grams = [g.norms.get(name, zero) for g in self._data or ()]
        joined = [self._joined(name, expert) for expert in experts]
        return prepare_norm(w0, joined, grams, anchor, mix.weights, self.normalise, self.device, name)
