r"""Norm layers under the anchor's prior: one small regression a channel, in closed form.

Channel c of a norm computes ``y = gamma_c x_hat_c + beta_c``, linear in w = (gamma, beta) over the inputs (x_hat, 1).
With the 2x2 Grams ``Gt`` of these inputs on task t (1x1 without a beta) the posterior mean is that of `bmm.solver`:

    m_c(lam) = (sum_t a_t w_tc Gtc + lam wa_c) (sum_t a_t Gtc + lam I)^-1,      w = w0 + rho (m(lam) - w0)

LOT Merging (arXiv 2505.23859) solves norms in closed form as well, without a prior: the limit lam -> 0 here.

Normalisation. One factor a layer and task brings the mean of all eigenvalues of the layer's channels to 1, so that
the lam of the layer's group means what it means for matrices, while channels keep their relative strength: one that
the data hardly move keeps the anchor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import MergeError
from .grams.spectrum import NOISE_FACTOR, task_weights
from .linalg import require_finite
from .solver import Scalar, check_scalars, check_sigma, moved, scalar, tensors_of


@dataclass(frozen=True, eq=False)
class PreparedNorm:
    """One norm, ready to be merged at any (lam, rho); see `prepare_norm`. k = 2 with a beta, 1 without.

    ``regression`` and ``anchor_part`` are task vectors in the channels' eigenbases; ``eigenvalues`` are float64, and 0
    where a direction has no evidence: the anchor stays there.
    """

    w0: Tensor  # (c, k) gamma, beta
    anchor: Tensor  # (c, k)
    anchor_part: Tensor  # (c, k)
    regression: Tensor  # (c, k)
    basis: Tensor  # (c, k, k) rows are eigenvectors
    eigenvalues: Tensor  # (c, k)
    dtype: torch.dtype
    name: str = "norm"

    @property
    def bytes(self) -> int:
        """Memory of all tensors held."""
        return sum(t.numel() * t.element_size() for t in tensors_of(self).values())

    def merge(self, lam: Scalar, rho: Scalar = 1.0, anchor_scale: Scalar = 1.0) -> Tensor:
        """The merged (gamma, beta) as (c, k); arguments, limits and errors as `PreparedModule.merge`."""
        check_scalars(self.name, lam, rho, anchor_scale)
        if all(isinstance(v, (int, float)) for v in (lam, rho, anchor_scale)) and (lam, rho * anchor_scale) == (
            math.inf,
            1,
        ):
            return self.anchor.to(self.dtype, copy=True)  # w0 + (wa - w0) would round
        seen = self.eigenvalues > 0
        ones = torch.ones_like(self.eigenvalues)
        safe = self.eigenvalues.where(seen, ones)
        share = (1 / (1 + scalar(lam, ones) / safe)).masked_fill(~seen, 0.0)  # (c, k)
        scale = scalar(anchor_scale, self.w0)
        kept = self.regression * share.to(self.w0) + scale * self.anchor_part * (1 - share).to(self.w0)  # (c, k)
        update = (kept.unsqueeze(1) @ self.basis).squeeze(1)  # (c, k)
        return (self.w0 + scalar(rho, self.w0) * update).to(self.dtype)

    def sample(
        self, lam: Scalar, rho: Scalar, sigma: float, generator: torch.Generator, anchor_scale: Scalar = 1.0
    ) -> Tensor:
        """A posterior draw (c, k); arguments and errors as `PreparedModule.sample`."""
        check_sigma(self.name, sigma)
        mean = self.merge(lam, rho, anchor_scale)
        lam64 = torch.as_tensor(lam).to(self.eigenvalues).reshape(())
        if bool(lam64 == 0) and bool((self.eigenvalues == 0).any()):
            raise MergeError(f"{self.name}: channels without evidence, and lam = 0 no prior", "sample with lam > 0")
        noise = torch.randn(self.w0.shape, generator=generator, device=generator.device).to(self.w0)
        scaled = noise * (self.eigenvalues + lam64).rsqrt().to(self.w0)  # (c, k)
        draw = (scaled.unsqueeze(1) @ self.basis).squeeze(1)  # (c, k)
        return mean + (torch.as_tensor(rho).to(self.w0).reshape(()) * sigma * draw).to(self.dtype)

    def to(self, device: torch.device | str) -> PreparedNorm:
        """The same norm with its tensors on ``device``."""
        return moved(self, device)


def prepare_norm(
    w0: Tensor,
    experts: Sequence[Tensor] | Tensor,
    grams: Sequence[Tensor],
    anchor: Tensor,
    weights: Sequence[float] | None = None,
    normalise: str = "trace",
    device: torch.device | str | None = None,
    name: str = "norm",
) -> PreparedNorm:
    """Everything of one norm's merge that does not depend on lam and rho, in float64.

    ``w0`` and ``anchor`` (c, k), ``experts`` T of them, ``grams`` T of (c, k, k), ``weights`` T numbers a_t >= 0.
    A zero Gram contributes nothing. Raises `MergeError` for mismatched shapes, non-finite values and bad weights.
    """
    channels, k = w0.shape
    if len(experts) != len(grams) or not len(experts):
        raise MergeError(f"{name}: {len(experts)} experts but {len(grams)} Grams", "pass one Gram per expert")
    if normalise not in ("trace", "none"):
        raise MergeError(f"{name}: unknown Gram normalisation {normalise!r}", 'use "trace" or "none"')
    shares = task_weights(weights, len(grams), name)
    base, wa = (_wide(t, w0.shape, f"{name}: {what}", device) for t, what in ((w0, "base"), (anchor, "anchor")))
    pooled = base.new_zeros(channels, k, k)  # (c, k, k)
    target = base.new_zeros(channels, k)  # (c, k)
    for t, (expert, raw) in enumerate(zip(experts, grams, strict=True)):
        gram = _wide(raw, (channels, k, k), f"{name}: Gram {t}", device)
        tau = _wide(expert, w0.shape, f"{name}: expert {t}", device) - base  # (c, k)
        trace = float(gram.diagonal(dim1=1, dim2=2).sum())
        scale = shares[t] * (channels * k / trace if normalise == "trace" else 1.0) if trace > 0 else 0.0
        pooled += scale * gram
        target += scale * (tau.unsqueeze(1) @ gram).squeeze(1)
    eigenvalues, vectors = torch.linalg.eigh(pooled)  # (c, k), (c, k, k)
    noise = NOISE_FACTOR * torch.finfo(torch.float64).eps * torch.linalg.matrix_norm(pooled)  # (c,)
    eigenvalues = torch.where(eigenvalues > noise.unsqueeze(1), eigenvalues, 0.0)
    seen = eigenvalues > 0
    rotated = (target.unsqueeze(1) @ vectors).squeeze(1)  # (c, k)
    regression = torch.where(seen, rotated / eigenvalues.where(seen, torch.ones_like(eigenvalues)), 0.0)
    dtype = torch.float64 if w0.dtype == torch.float64 else torch.float32
    return PreparedNorm(
        w0=base.to(dtype),
        anchor=wa.to(dtype),
        anchor_part=((wa - base).unsqueeze(1) @ vectors).squeeze(1).to(dtype),
        regression=regression.to(dtype),
        basis=vectors.mT.contiguous().to(dtype),
        eigenvalues=eigenvalues,
        dtype=w0.dtype,
        name=name,
    )


def _wide(tensor: Tensor, shape: Sequence[int], label: str, device: torch.device | str | None) -> Tensor:
    if tuple(tensor.shape) != tuple(shape):
        raise MergeError(f"{label} is {tuple(tensor.shape)}, not {tuple(shape)}", "compare shapes")
    require_finite(label, tensor)
    return tensor.detach().to(device or "cpu", torch.float64)
