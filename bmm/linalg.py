"""Guarded dense linear algebra: eigenvectors, singular triples and polar factors that say what went wrong."""

from __future__ import annotations

import math
import struct
import sys

import torch
from torch import Tensor

from .errors import MergeError

LARGE_PRODUCT = 1 << 24
"""Multiplications from which on a product is worth being brought to oneDNN."""

_FORMATS = {torch.float64: "d", torch.float32: "f", torch.float16: "e"}  # of `struct`


def largest(tensor: Tensor) -> float:
    """The largest magnitude in a floating tensor, inf or NaN where it holds one; 0 where it is empty.

    On the CPU by the bits: without its sign a number is larger where the integer of its bits is, NaN largest of all,
    and integers are compared several times faster than floats that may be NaN. Elsewhere one synchronisation.
    """
    if not tensor.numel():
        return 0.0
    tensor = tensor.detach()
    if (
        tensor.device.type != "cpu"
        or not tensor.is_contiguous()
        or not (tensor.dtype in _FORMATS or tensor.dtype == torch.bfloat16)
    ):
        low, high = torch.stack(torch.aminmax(tensor)).tolist()
        return max(-low, high)
    width = 8 * tensor.itemsize
    bits = tensor.reshape(-1).view(getattr(torch, f"int{width}")).numpy()
    positive = int(bits.max())
    negative = int(bits.view(f"u{tensor.itemsize}").max()) - 2 ** (width - 1)  # the sign is the highest bit
    found = max(positive, negative)
    if tensor.dtype == torch.bfloat16:
        return float(struct.unpack("=f", struct.pack("=I", found << 16))[0])
    return float(struct.unpack("=" + _FORMATS[tensor.dtype], found.to_bytes(tensor.itemsize, sys.byteorder))[0])


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor Inf; see `largest`."""
    return math.isfinite(largest(tensor))


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, (o, r) by (r, i): large float32 ones on the CPU by oneDNN, best with a contiguous ``right.mT``.

    torch gives them to MKL, which on processors of other makers than Intel leaves half of the vector units' width
    unused: 97 GFLOP/s on one core of an AMD EPYC where oneDNN reaches 220. What is differentiated is left to torch.
    """
    plain = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.dim() == 2 for t in (left, right))
    watched = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    small = left.shape[-2] * left.shape[-1] * right.shape[-1] < LARGE_PRODUCT
    if not plain or watched or small or not torch.backends.mkldnn.is_available():
        return left @ right
    turned = right.mT.contiguous().to_mkldnn()
    return torch.nn.functional.linear(left.contiguous().to_mkldnn(), turned).to_dense()


def require_finite(name: str, *tensors: Tensor) -> None:
    """Raise `MergeError` where a tensor holds NaN or Inf, naming it and the count."""
    for tensor in tensors:
        if not all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise MergeError(
                f"{name} holds {bad} non-finite values of {tensor.numel()}",
                "check the experts and the calibration inputs for NaN or overflow",
            )


def eigh_psd(matrix: Tensor, name: str = "Gram", dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,) ascending, clamped at 0, and eigenvectors (n, n) of a symmetric PSD matrix.

    Computed in ``dtype`` (float64 by default, whatever the input's) on the input's device.
    Raises `MergeError` for non-finite input or a failed decomposition.
    """
    require_finite(name, matrix)
    work = matrix.to(dtype)
    work = (work + work.mT).div_(2)
    try:
        values, vectors = torch.linalg.eigh(work)
    except torch.linalg.LinAlgError as error:
        raise MergeError(f"{name}: eigendecomposition failed ({error})", "drop outlier calibration inputs") from error
    return values.clamp_min(0), vectors


def leading_triples(matrix: Tensor, count: int, noise: float, name: str = "matrix") -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` leading singular triples in float64: u (o, k), s (k,) descending, v (i, k), k <= count.

    Singular values up to ``noise`` are rounding: their vectors are arbitrary, differ from one LAPACK to the next, and
    are left out, so that k may be smaller; see `rounding`.
    Raises `MergeError` for non-finite input or a failed decomposition. Accuracy: see `_singular`.
    """
    short = _short(matrix, name)  # (m, n)
    s, u = _singular(short, count, noise, name)  # (k,), (m, k)
    v = short.mT @ (u / s)  # (n, k)
    return (u, s, v) if matrix.shape[0] <= matrix.shape[1] else (v, s, u)


def truncated(matrix: Tensor, rank: int, name: str = "matrix") -> tuple[Tensor, Tensor, Tensor]:
    """At most ``rank`` leading singular triples in float64: u (o, k), s (k,), v (i, k); rounding is left out.

    By `leading_triples`, or where the rank is small next to the matrix by subspace iteration from a fixed draw (Halko
    et al., arXiv 0909.4061, algorithm 4.4), which finds them up to about 1e-3 of the first one left out.
    Raises `MergeError` for non-finite input.
    """
    short, flipped = min(matrix.shape), matrix.shape[0] > matrix.shape[1]
    noise = rounding(matrix, torch.float64)
    if 4 * (rank + OVERSAMPLING) >= short:
        return leading_triples(matrix, rank, noise, name)
    flat = _short(matrix, name)  # (m, n)
    draw = torch.Generator().manual_seed(0)
    basis = torch.randn(flat.shape[1], rank + OVERSAMPLING, generator=draw, dtype=torch.float64).to(flat.device)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(flat.mT @ torch.linalg.qr(flat @ basis).Q).Q  # (n, k)
    basis = torch.linalg.qr(flat @ basis).Q  # (m, k)
    u, s, v = leading_triples(basis.mT @ flat, rank, noise, name)
    u = basis @ u
    return (v, s, u) if flipped else (u, s, v)


def polar(matrix: Tensor, noise: float, name: str = "matrix", overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """The partial isometry ``u @ v'`` (o, i) over all singular triples above ``noise``, and their s (k,), in float64.

    With full rank this is the nearest matrix with orthonormal columns (o >= i) or rows. Below, that one is not unique:
    it fills up with arbitrary directions, which are left out here. ``overwrite`` puts the result where the matrix was,
    if that is in float64. Errors and accuracy as in `leading_triples`.
    """
    short = _short(matrix, name)
    s, u = _singular(short, len(short), noise, name)
    turn = (u / s) @ u.mT  # (m, m)
    isometry = short if overwrite or short.data_ptr() != matrix.data_ptr() else torch.empty_like(short)  # (m, n)
    for result, part in zip(isometry.split(512, 1), short.split(512, 1), strict=True):
        result.copy_(turn @ part)
    return isometry if matrix.shape[0] <= matrix.shape[1] else isometry.mT, s


def rounding(matrix: Tensor, dtype: torch.dtype, norm: float | None = None) -> float:
    """Singular values (o, i) that come of rounding entries to ``dtype``, for terms of Frobenius norm ``norm`` in all.

    Independent errors of ``eps / 2`` an entry make a matrix of spectral norm about ``eps norm / (2 sqrt(min(o, i)))``;
    sixteen times that leaves room for products that round several times, as in a LoRA. Decomposing in float64 adds
    1e-12. ``norm`` is by default the matrix's own.
    """
    size = float(torch.linalg.vector_norm(matrix)) if norm is None else norm
    return max(8 * torch.finfo(dtype).eps / min(matrix.shape) ** 0.5, 1e-12) * size


def _short(matrix: Tensor, name: str) -> Tensor:
    """The matrix in float64, laid as (m, n) with m <= n."""
    require_finite(name, matrix)
    return (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT).double()


OVERSAMPLING, ITERATIONS = 10, 4
"""Columns more than the rank, and rounds, of a subspace iteration."""

RESOLVED = 1e-3
"""Ratio of singular values down to which one Gram in float64 is trusted."""


def _singular(short: Tensor, count: int, noise: float, name: str) -> tuple[Tensor, Tensor]:
    """Leading singular values (k,) above ``noise``, descending, and left singular vectors (m, k) of ``short`` (m, n).

    From the eigenvectors of the (m, m) Gram, which takes a third of an SVD's time where n = 4 m. Squaring costs
    accuracy, ``2e-16 (s_1 / s_k)^2`` or 2e-10 at the ratio `RESOLVED`: what lies below is decomposed again within the
    subspace it spans, where it is the largest, which leaves about 1e-6 at a ratio of 1e-6.
    """
    e, u = eigh_psd(short @ short.mT, name)  # (m,), (m, m)
    s, u = e.sqrt().flip(0), u.flip(1)
    coarse = int((s > RESOLVED * s[0]).sum())
    if 0 < coarse < min(count, len(s)):
        fine = u[:, coarse:].mT @ short  # (m - coarse, n)
        below, turn = s[:0], u.new_empty(len(fine), 0)
        if float(torch.linalg.vector_norm(fine)) > noise:
            below, turn = _singular(fine, count - coarse, noise, name)
        s, u = torch.cat([s[:coarse], below]), torch.cat([u[:, :coarse], u[:, coarse:] @ turn], 1)
    k = min(count, int((s > noise).sum()))
    return s[:k], u[:, :k]
