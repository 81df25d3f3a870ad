r"""BMM: anchor-regularised Bayesian regression of one module, in closed form (arXiv 2605.12843).

For task t the module's inputs ``Xt`` (n_t, i) and targets ``Xt @ wt.T`` carry Gaussian noise sigma^2, and the merged
weight has the prior ``N(wa, sigma^2 / lam)`` around an anchor merge ``wa``. With ``G = sum_t a_t Gt``, the posterior of
every row is Gaussian with covariance ``sigma^2 (G + lam I)^-1`` and the matrix has the mean

    m(lam) = (sum_t a_t wt Gt + lam wa) (G + lam I)^-1,        w(lam, rho) = w0 + rho (m(lam) - w0).

Nothing but ``lam`` and ``rho`` changes while they are tuned. Let ``G = U diag(e) U'`` over its r directions with
evidence, ``d = wa - w0``, and ``regression = [sum_t a_t tau_t Gt] U diag(1/e)``, the minimum-norm RegMean solution in
that basis. Then, direction by direction, the posterior mean lies between the regression and the anchor:

    m - w0 = (d - d U U') + [regression diag(e / (e + lam)) + d U diag(lam / (e + lam))] U'

which is one (o, r) x (r, i) product. Precision: both shares lie in [0, 1] and are formed in float64, so that nothing
over- or underflows and no term exceeds the result's own scale by more than the data ask for. Measured against a
float64 dense solve (i up to 256, any rank, conditioning up to 1e12, lam from 1e-6 to 1e6) the float32 result is within
1e-7 relative. The residual form ``d + [sum_t a_t (tau_t - d) Gt] U diag(1/(e + lam)) U'`` is as good while the anchor
is of the experts' size; with an anchor a thousand times further out it misses by 4e-5 (this one: 3e-7), because it
subtracts the anchor from itself where the data disagree with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .errors import MergeError
from .grams.spectrum import Spectrum, decompose, task_weights
from .linalg import product, require_finite

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Scalar = float | Tensor
Record = TypeVar("Record", bound="DataclassInstance")


@dataclass(frozen=True, eq=False)
class PreparedModule:
    """One module, ready to be merged at any (lam, rho); see `prepare`.

    Tensors are float32 (float64 where ``w0`` is) but for the ``eigenvalues`` (r,), always float64. ``w0`` and
    ``anchor`` are not copied where dtype and device allow: do not change them in place while this is in use.
    """

    w0: Tensor  # (o, i)
    anchor: Tensor  # (o, i)
    remainder: Tensor | None  # (o, i) part of the anchor's task vector outside the basis; None where r = i
    anchor_part: Tensor  # (o, r) the anchor's task vector in the basis
    regression: Tensor  # (o, r) minimum-norm RegMean task vector in the basis
    basis: Tensor  # (r, i) rows are eigenvectors of the pooled Gram
    eigenvalues: Tensor  # (r,)
    shape: torch.Size
    dtype: torch.dtype
    name: str = "module"

    @property
    def rank(self) -> int:
        """Number of input directions with evidence."""
        return self.basis.shape[0]

    @property
    def bytes(self) -> int:
        """Memory of all tensors held, shared ones included."""
        return sum(t.numel() * t.element_size() for t in tensors_of(self).values())

    def merge(self, lam: Scalar, rho: Scalar = 1.0, anchor_scale: Scalar = 1.0) -> Tensor:
        """The merged weight, in the shape and dtype of ``w0``: ``w0 + rho * (m(lam) - w0)``.

        ``lam`` in [0, inf]: ``math.inf`` is the anchor itself (bit for bit where rho = anchor_scale = 1), 0 the limit
        of least regularisation: RegMean on directions with evidence, the anchor elsewhere. ``anchor_scale``
        multiplies the anchor's task vector, for anchors linear in a coefficient. All three may be one-element
        tensors, and the result is differentiable in them.
        Raises `MergeError` for a negative or NaN ``lam`` and for a non-finite ``rho`` or ``anchor_scale``.
        """
        check_scalars(self.name, lam, rho, anchor_scale)
        if isinstance(lam, (int, float)) and (math.isinf(lam) or self.rank == 0):
            return self._restore(self._anchor_only(rho, anchor_scale))
        regression_share = self._regression_share(lam)  # (r,)
        anchor_share = scalar(anchor_scale, self.w0) * (1 - regression_share)  # (r,)
        kept = self.regression * self._compute(regression_share) + self.anchor_part * self._compute(anchor_share)
        update = product(kept, self.basis)  # (o, i)
        if self.remainder is not None:
            update = update + scalar(anchor_scale, self.w0) * self.remainder  # (o, i)
        return self._restore(self.w0 + scalar(rho, self.w0) * update)

    def assemble(self, update: Tensor, rho: Scalar) -> Tensor:
        """``w0 + rho * update`` in the shape and dtype of ``w0``, for a posterior mean solved elsewhere."""
        return self._restore(self.w0 + scalar(rho, self.w0) * update.to(self.w0))

    def sample(
        self, lam: Scalar, rho: Scalar, sigma: float, generator: torch.Generator, anchor_scale: Scalar = 1.0
    ) -> Tensor:
        """A posterior draw ``w0 + rho * (m(lam) + sigma * E (G + lam I)^-1/2 - w0)``, E (o, i) standard normal.

        Input directions without evidence have the prior's variance ``sigma^2 / lam``. Noise is drawn on the
        generator's device. Raises `MergeError` as `merge` does, for a negative or non-finite ``sigma``, and at
        lam = 0 where some direction has no evidence: the variance is infinite there.
        """
        check_sigma(self.name, sigma)
        mean = self.merge(lam, rho, anchor_scale)
        lam64 = self._wide(lam)
        if bool(torch.isinf(lam64)):
            return mean
        o, i = self.w0.shape
        if bool(lam64 == 0) and self.rank < i:
            raise MergeError(
                f"{self.name}: {i - self.rank} of {i} input directions have no evidence, and lam = 0 no prior",
                "sample with lam > 0",
            )
        noise = torch.randn((o, i), generator=generator, device=generator.device, dtype=self.w0.dtype).to(
            self.w0.device
        )
        deviation = (self.eigenvalues + lam64).rsqrt()  # (r,)
        if self.rank < i:
            prior = lam64.rsqrt()
            inside = (noise @ self.basis.mT) * self._compute(deviation - prior)  # (o, r)
            noise = noise * self._compute(prior) + inside @ self.basis  # (o, i)
        else:
            noise = ((noise @ self.basis.mT) * self._compute(deviation)) @ self.basis  # (o, i)
        return mean + (self._compute(rho) * sigma * noise).reshape(self.shape).to(self.dtype)

    def to(self, device: torch.device | str) -> PreparedModule:
        """The same module with its tensors on ``device``."""
        return moved(self, device)

    def _anchor_only(self, rho: Scalar, anchor_scale: Scalar) -> Tensor:
        factor = rho * anchor_scale
        if isinstance(factor, (int, float)) and factor == 1:
            return self.anchor.clone()  # w0 + (wa - w0) would round
        return self.w0 + scalar(factor, self.w0) * (self.anchor - self.w0)  # (o, i)

    def _regression_share(self, lam: Scalar) -> Tensor:
        """``e / (e + lam)`` (r,) in float64, in the form whose value and slope are finite from lam = 0 to inf."""
        return 1 / (1 + scalar(lam, self.eigenvalues) / self.eigenvalues)

    def _wide(self, value: Scalar) -> Tensor:
        return torch.as_tensor(value).to(self.eigenvalues).reshape(())

    def _compute(self, value: Scalar) -> Tensor:
        """A scalar or a vector over the basis, in the dtype and on the device of the matrices."""
        tensor = torch.as_tensor(value, device=self.w0.device).to(self.w0.dtype)
        return tensor.reshape(()) if tensor.numel() == 1 and tensor.dim() > 1 else tensor

    def _restore(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.shape).to(self.dtype)


def scalar(value: Scalar, like: Tensor) -> Scalar:
    """A number as it is, a one-element tensor in dtype and on the device of ``like``, without dimensions.

    Kernels take numbers as arguments: made into a tensor, each would be copied to the device, and the host would wait.
    """
    return value.to(like).reshape(()) if isinstance(value, Tensor) else float(value)


def tensors_of(record: Any) -> dict[str, Tensor]:
    """The fields of a dataclass that hold tensors."""
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    return {k: v for k, v in values.items() if isinstance(v, Tensor)}


def moved(record: Record, device: torch.device | str) -> Record:
    """The same dataclass with its tensors on ``device``."""
    found: dict[str, Any] = {k: v.to(device) for k, v in tensors_of(record).items()}
    return replace(record, **found)


def check_sigma(name: str, sigma: float) -> None:
    """Raise `MergeError` for a noise scale that is negative or not finite."""
    if not (math.isfinite(sigma) and sigma >= 0):
        raise MergeError(f"{name}: sigma is {sigma}", "the noise scale is a finite number >= 0")


def check_scalars(name: str, lam: Scalar, rho: Scalar, anchor_scale: Scalar) -> None:
    """Raise `MergeError` for a negative or NaN ``lam``, a non-finite ``rho`` or ``anchor_scale``, and for vectors."""
    for label, value in (("lam", lam), ("rho", rho), ("anchor_scale", anchor_scale)):
        if isinstance(value, Tensor) and value.numel() != 1:
            raise MergeError(f"{name}: {label} has {value.numel()} elements", "pass one number per module")
        number = float(value.detach() if isinstance(value, Tensor) else value)
        if math.isnan(number) or (label == "lam" and number < 0):
            raise MergeError(f"{name}: {label} is {number}", "lam lies in [0, inf], rho is a finite number")
        if label != "lam" and math.isinf(number):
            raise MergeError(f"{name}: {label} is {number}", f"{label} is a finite number")


def prepare(
    w0: Tensor,
    experts: Sequence[Tensor] | Tensor,
    grams: Sequence[Tensor],
    anchor: Tensor,
    weights: Sequence[float] | None = None,
    normalise: str = "trace",
    device: torch.device | str | None = None,
    name: str = "module",
    spectrum: Spectrum | None = None,
) -> PreparedModule:
    """Everything of one module's merge that does not depend on lam and rho (arXiv 2605.12843).

    ``w0`` (o, i), ``experts`` T weights (o, i) or one tensor (T, o, i), ``grams`` T matrices (i, i), ``anchor`` (o, i),
    ``weights`` T numbers a_t >= 0 (all 1 by default). Convolutions (o, c, kh, kw) count as (o, c * kh * kw) and come
    back in their own shape. For a bias see `join_bias`. ``spectrum``: the result of `decompose` on the same Grams,
    weights and normalisation, to share the decomposition between modules.
    Float64 inside, on ``device`` (CPU by default), where the result lives as well.
    Raises `MergeError` for no experts, mismatched shapes, non-finite values, bad weights or a foreign spectrum.
    """
    count = len(experts)
    if count == 0:
        raise MergeError(f"{name}: no experts", "pass at least one expert")
    if len(grams) != count:
        raise MergeError(f"{name}: {count} experts but {len(grams)} Grams", "pass one Gram per expert")
    if w0.dim() < 2:
        raise MergeError(f"{name}: weight has shape {tuple(w0.shape)}", "only matrices and convolutions have a Gram")
    for label, tensor in [("anchor", anchor), *((f"expert {t}", experts[t]) for t in range(count))]:
        if tensor.shape != w0.shape:
            raise MergeError(f"{name}: {label} is {tuple(tensor.shape)}, the base {tuple(w0.shape)}", "compare shapes")
    base = _matrix(w0, f"{name}: base", device)  # (o, i)
    require_finite(f"{name}: anchor", anchor)
    if tuple(grams[0].shape) != (base.shape[1], base.shape[1]):
        raise MergeError(
            f"{name}: Gram is {tuple(grams[0].shape)}, the weight has {base.shape[1]} inputs",
            "Grams of inputs with a bias coordinate need weights joined by join_bias",
        )
    if spectrum is None:
        spectrum = decompose(grams, weights, normalise, device, name)
    else:
        _require_same_evidence(spectrum, grams, task_weights(weights, count, name), normalise, name)
    target = torch.zeros_like(base)  # (o, i), becomes sum_t a_t tau_t Gt
    for t in range(count):
        tau = _matrix(experts[t], f"{name}: expert {t}", device) - base  # (o, i)
        if spectrum.scales[t] > 0:
            target.addmm_(tau, grams[t].detach().to(tau), alpha=spectrum.scales[t])
    return from_target(w0, anchor, target, spectrum, name)


def from_target(w0: Tensor, anchor: Tensor, target: Tensor, spectrum: Spectrum, name: str = "module") -> PreparedModule:
    """The module whose evidence is ``target``, ``sum_t a_t tau_t Gt`` (o, i) in float64, and the Grams' spectrum."""
    base = w0.detach().to(target).flatten(1)  # (o, i)
    d = anchor.detach().to(target).flatten(1) - base  # (o, i)
    basis = spectrum.basis.to(base)  # (i, r)
    eigenvalues = spectrum.eigenvalues.to(base)  # (r,)
    regression = (target @ basis) / eigenvalues  # (o, r)
    anchor_part = d @ basis  # (o, r)
    remainder = d - anchor_part @ basis.mT if spectrum.rank < spectrum.dim else None  # (o, i)
    dtype = torch.float64 if w0.dtype == torch.float64 else torch.float32
    return PreparedModule(
        w0=w0.detach().to(base.device, dtype).flatten(1),
        anchor=anchor.detach().to(base.device, dtype).flatten(1),
        remainder=None if remainder is None else remainder.to(dtype),
        anchor_part=anchor_part.to(dtype),
        regression=regression.to(dtype),
        basis=basis.mT if dtype == torch.float64 else spectrum.rows32.to(base.device),
        eigenvalues=eigenvalues,
        shape=w0.shape,
        dtype=w0.dtype,
        name=name,
    )


def join_bias(weight: Tensor, bias: Tensor) -> Tensor:
    """``[weight | bias]`` (o, i + 1) of a weight (o, i) or (o, c, kh, kw), bias (o,), as a homogeneous Gram expects."""
    if bias.shape != weight.shape[:1]:
        raise MergeError(f"bias is {tuple(bias.shape)}, weight {tuple(weight.shape)}", "the bias has one entry a row")
    return torch.cat([weight.flatten(1), bias.to(weight).unsqueeze(1)], dim=1)


def split_bias(joined: Tensor, shape: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Undo `join_bias`: weight (o, i), or in ``shape`` where given, and bias (o,)."""
    weight = joined[:, :-1].contiguous()
    return (weight if shape is None else weight.reshape(tuple(shape))), joined[:, -1].contiguous()


def _matrix(weight: Tensor, label: str, device: torch.device | str | None) -> Tensor:
    require_finite(label, weight)
    return weight.detach().to(device or "cpu", torch.float64).flatten(1)


def _require_same_evidence(
    spectrum: Spectrum, grams: Sequence[Tensor], weights: tuple[float, ...], normalise: str, name: str
) -> None:
    """A shared spectrum must belong to these very Grams, weights and normalisation."""
    same = (spectrum.weights, spectrum.normalise) == (weights, normalise) and all(
        g is s or (g.shape == s.shape and torch.equal(g, s)) for g, s in zip(grams, spectrum.grams, strict=True)
    )
    if not same:
        raise MergeError(f"{name}: the spectrum is of other Grams or settings", "decompose these Grams for this module")
