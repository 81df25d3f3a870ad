"""Task weights and the Gram mix as search variables: the posterior mean where the pooled Gram changes in every trial.

`bmm.solver` decomposes the pooled Gram once because nothing but lam and rho changes. With searched task weights a_t or
a searched gamma it is another matrix each trial. What stays are the tasks' Grams and the products ``tau_t Gt``; a trial
sums them, factorises ``G + lam I`` once (Cholesky, float64, shared by the modules that read the same input under the
same lam) and solves

    m(lam) - w0 = (sum_t a_t tau_t Gt + lam d) (G + lam I)^-1.

That is exact, but for one thing: a Cholesky factor cannot tell rounding from evidence. Where lam is less than a million
times the Gram's rounding noise (never with float64 Grams and lam in the default range) the module is decomposed as in
`bmm.solver`, at the price of an eigendecomposition.

Cost, measured on the zoo's vit8 (8 tasks, 27 modules on 19 inputs of 27 to 480, one thread): a merge takes 26 ms with
fixed task weights, 135 ms with searched ones and 203 ms with a searched gamma (whose Grams no two modules share);
scoring the merged model on the validation data takes 2.7 s. Memory: one more (o, i) matrix in float64 a task and
module, two with hybrid Grams: 67 and 133 MiB there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .grams.spectrum import Spectrum, directions, noise_level, task_weights
from .norms import PreparedNorm, prepare_norm
from .solver import PreparedModule, check_scalars, from_target

SAFE_RATIO = 1e6
"""A Cholesky factor serves where lam is this many times the noise of the pooled Gram: noise moves the mean by 1e-6."""


@dataclass(frozen=True)
class Mix:
    """How the tasks' Grams are pooled: task weights a_t (T,) and the data-free share gamma (of hybrid Grams)."""

    weights: tuple[float, ...]
    gamma: float

    def same(self, other: Mix) -> bool:
        """Equal up to the rounding of a logarithm and back."""
        pairs = zip((*self.weights, self.gamma), (*other.weights, other.gamma), strict=True)
        return all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in pairs)

    def shares(self, parts: int) -> tuple[float, ...]:
        """What each part of a task's Gram counts: of one all, of two the data's 1 - gamma and the data-free gamma."""
        return (1.0,) if parts == 1 else (1 - self.gamma, self.gamma)


def task_scales(
    traces: Sequence[float], shares: Sequence[float], weight: float, dim: int, normalise: str
) -> list[float]:
    """The factor in the pooled Gram of every part of one task's Gram (dim, dim), given the parts' traces; the
    normalisation is that of `decompose`."""
    trace = sum(share * part for share, part in zip(shares, traces, strict=True))
    scale = dim / trace if normalise == "trace" and trace > 0 else 1.0
    factor = weight * scale if trace > 0 and math.isfinite(scale) else 0.0
    return [factor * share for share in shares]


@dataclass(eq=False)
class InputGrams:
    """The tasks' Grams of one input, for every module that reads it.

    ``parts``: one tuple of T Grams (i, i), or two where data and data-free Grams are mixed by gamma.
    """

    parts: tuple[tuple[Tensor, ...], ...]
    normalise: str
    name: str
    traces: list[list[float]] = field(init=False)

    def __post_init__(self) -> None:
        self.traces = [[float(g.diagonal().double().sum()) for g in part] for part in self.parts]

    def scales(self, mix: Mix) -> list[list[float]]:
        """The factor of every part and task in the pooled Gram; the normalisation is that of `decompose`."""
        shares = mix.shares(len(self.parts))
        dim = self.parts[0][0].shape[-1]
        weights = task_weights(mix.weights, len(self.parts[0]), self.name)
        columns = [
            task_scales([part[t] for part in self.traces], shares, weight, dim, self.normalise)
            for t, weight in enumerate(weights)
        ]
        return [list(row) for row in zip(*columns, strict=True)]

    def pooled(self, mix: Mix, like: Tensor) -> tuple[Tensor, float]:
        """The pooled Gram (i, i), in dtype and on the device of ``like``, and its noise level."""
        dim = self.parts[0][0].shape[-1]
        total, eps = like.new_zeros(dim, dim), torch.finfo(torch.float64).eps
        for part, scales in zip(self.parts, self.scales(mix), strict=True):
            for gram, scale in zip(part, scales, strict=True):
                if scale > 0:
                    total.add_(gram.to(total), alpha=scale)
                    eps = max(eps, torch.finfo(gram.dtype).eps)
        return total, noise_level(total, eps)


def factorised(gram: Tensor, noise: float, lam: float) -> Tensor | None:
    """The Cholesky factor of ``(G + lam I) / max(lam, 1)`` (i, i); None where rounding would count as evidence."""
    unit = max(lam, 1.0)  # the division keeps any finite lam in range
    shifted = gram / unit  # (i, i)
    shifted.diagonal().add_(lam / unit)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    return factor if lam > SAFE_RATIO * noise and int(failed) == 0 else None


def posterior_update(target: Tensor, d: Tensor, lam: float, factor: Tensor) -> Tensor:
    """``(target + lam d) (G + lam I)^-1`` (o, i), by the factor of `factorised`."""
    unit = max(lam, 1.0)
    return torch.cholesky_solve((target / unit + (lam / unit) * d).mT, factor).mT


def spectrum_of(pooled: Tensor, noise: float, normalise: str, name: str) -> Spectrum:
    """The decomposition of a pooled Gram (i, i), where its tasks' Grams are gone."""
    eigenvalues, basis = directions(pooled, noise, name)
    return Spectrum(eigenvalues, basis, (), (), (), normalise)


class Trial:
    """One trial's mix, with the pooled Grams and factors that its modules share."""

    def __init__(self, mix: Mix) -> None:
        self.mix = mix
        self._pooled: dict[InputGrams, tuple[Tensor, float]] = {}
        self._factors: dict[tuple[InputGrams, float], Tensor | None] = {}

    def pooled(self, source: InputGrams, like: Tensor) -> tuple[Tensor, float]:
        """`InputGrams.pooled`, once a trial."""
        if source not in self._pooled:
            self._pooled[source] = source.pooled(self.mix, like)
        return self._pooled[source]

    def factor(self, source: InputGrams, lam: float, like: Tensor) -> Tensor | None:
        """`factorised`, once a trial."""
        key = (source, lam)
        if key not in self._factors:
            gram, noise = self.pooled(source, like)
            self._factors[key] = factorised(gram, noise, lam)
        return self._factors[key]


@dataclass(frozen=True, eq=False)
class ModuleEvidence:
    """One module's part: the products ``tau_t Gt`` of every part, each (T, o, i) in float64."""

    prepared: PreparedModule
    source: InputGrams
    products: tuple[Tensor, ...]

    @classmethod
    def of(cls, prepared: PreparedModule, source: InputGrams, taus: Tensor) -> ModuleEvidence:
        """From the task vectors (T, o, i) in float64."""
        device = prepared.w0.device
        products = tuple(
            torch.stack([tau.to(device) @ gram.to(device, tau.dtype) for tau, gram in zip(taus, part, strict=True)])
            for part in source.parts
        )
        return cls(prepared, source, products)

    def merge(self, lam: float, rho: float, anchor_scale: float, trial: Trial) -> Tensor:
        """As `PreparedModule.merge`, with the Grams pooled by the trial's mix."""
        module = self.prepared
        check_scalars(module.name, lam, rho, anchor_scale)
        if math.isinf(lam):
            return module.merge(lam, rho, anchor_scale)
        target = self._target(trial.mix)  # (o, i)
        factor = trial.factor(self.source, lam, target)
        if factor is None:
            return self._spectral(target, *trial.pooled(self.source, target)).merge(lam, rho, anchor_scale)
        d = module.anchor.to(target) - module.w0.to(target)  # (o, i)
        return module.assemble(posterior_update(target, anchor_scale * d, lam, factor), rho)

    def spectral(self, mix: Mix) -> PreparedModule:
        """The module decomposed anew at this mix, for whatever needs more than the mean."""
        target = self._target(mix)
        return self._spectral(target, *self.source.pooled(mix, target))

    def _target(self, mix: Mix) -> Tensor:
        """``sum_t a_t tau_t Gt`` (o, i)."""
        pairs = zip(self.products, self.source.scales(mix), strict=True)
        return sum(
            (torch.einsum("t,toi->oi", p.new_tensor(scales), p) for p, scales in pairs),
            torch.zeros_like(self.products[0][0]),
        )

    def _spectral(self, target: Tensor, pooled: Tensor, noise: float) -> PreparedModule:
        module = self.prepared
        spectrum = spectrum_of(pooled, noise, self.source.normalise, module.name)
        solved = from_target(module.w0, module.anchor, target, spectrum, module.name)
        return replace(solved, shape=module.shape, dtype=module.dtype)


@dataclass(frozen=True, eq=False)
class NormEvidence:
    """One norm's part. A trial solves it anew: channels are 2x2, and the mix of data and task vectors leaves norms
    alone, since a task vector says nothing about a norm's inputs."""

    prepared: PreparedNorm
    experts: Tensor  # (T, c, k)
    grams: Sequence[Tensor]  # T of (c, k, k)
    normalise: str

    def merge(self, lam: float, rho: float, anchor_scale: float, trial: Trial) -> Tensor:
        """As `PreparedNorm.merge`, with the trial's task weights."""
        return self.spectral(trial.mix).merge(lam, rho, anchor_scale)

    def spectral(self, mix: Mix) -> PreparedNorm:
        """The norm prepared anew with these task weights."""
        norm = self.prepared
        return prepare_norm(
            norm.w0, self.experts, self.grams, norm.anchor, mix.weights, self.normalise, norm.w0.device, norm.name
        )
