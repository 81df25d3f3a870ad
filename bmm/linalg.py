"""Guarded dense linear algebra: symmetric eigendecomposition and SVD that say what went wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import MergeError


def require_finite(name: str, *tensors: Tensor) -> None:
    """Raise `MergeError` where a tensor holds NaN or Inf, naming it and the count."""
    for tensor in tensors:
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
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
    work = (work + work.mT) / 2
    try:
        values, vectors = torch.linalg.eigh(work)
    except torch.linalg.LinAlgError as error:
        raise MergeError(f"{name}: eigendecomposition failed ({error})", "drop outlier calibration inputs") from error
    return values.clamp_min(0), vectors


def svd(matrix: Tensor, name: str = "matrix") -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD in the input's dtype (float32 at least): u (o, r), s (r,), vh (r, i), r = min(o, i)."""
    require_finite(name, matrix)
    work = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
    try:
        u, s, vh = torch.linalg.svd(work, full_matrices=False)
        if torch.isfinite(s).all():
            return u, s, vh
    except torch.linalg.LinAlgError:
        pass
    try:  # the divide-and-conquer driver rarely fails; float64 on the CPU has always got through
        u, s, vh = torch.linalg.svd(work.double().cpu(), full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise MergeError(f"{name}: singular value decomposition failed ({error})", "") from error
    return u.to(work), s.to(work), vh.to(work)


def leading_triples(
    matrix: Tensor, count: int, name: str = "matrix", size: float | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` leading singular triples in float64: u (o, k), s (k,) descending, v (i, k), k <= count.

    Values up to ``max(o, i) * eps * size`` are rounding: their vectors are arbitrary, differ from one LAPACK to the
    next, and are left out, so that k may be smaller. ``size`` is by default the largest singular value; eps is that of
    ``dtype``, the precision the numbers have, by default the matrix's.
    Raises `MergeError` for non-finite input or a failed decomposition. Accuracy: see `_spectrum`.
    """
    s, u, short = _spectrum(matrix, name, size, dtype)  # (k,), (m, k), (m, n)
    s, u = s[:count], u[:, :count]
    v = short.mT @ (u / s)  # (n, k)
    return (u, s, v) if matrix.shape[0] <= matrix.shape[1] else (v, s, u)


def polar(
    matrix: Tensor, name: str = "matrix", size: float | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The partial isometry ``u @ v'`` (o, i) over all singular triples above rounding, and their s (k,), in float64.

    With full rank this is the nearest matrix with orthonormal columns (o >= i) or rows. Below, that one is not unique:
    it fills up with arbitrary directions, which are left out here. Arguments, errors and accuracy as in
    `leading_triples`.
    """
    s, u, short = _spectrum(matrix, name, size, dtype)
    isometry = ((u / s) @ u.mT) @ short  # (m, n)
    return isometry if matrix.shape[0] <= matrix.shape[1] else isometry.mT, s


RESOLVED = 1e-5
"""Smallest ratio of singular values that a Gram in float64 is trusted with."""


def _spectrum(
    matrix: Tensor, name: str, size: float | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What is above rounding: singular values (k,) descending, and singular vectors (m, k) of the shorter side; then
    the matrix laid as (m, n), m <= n. All in float64.

    From the eigenvectors of the (m, m) Gram in float64. Squaring costs accuracy where values are far below the largest:
    a triple is off by about ``2e-16 (s_1 / s_k)^2``, 2e-6 at the ratio `RESOLVED`; but whatever is below
    ``n * 1e-7`` of the largest is rounding of a float32 matrix in any case. Where smaller ratios count, in small
    matrices (which cost nothing) and in float64 ones, it is an SVD.
    """
    precision = torch.finfo(dtype or matrix.dtype).eps * max(matrix.shape)
    require_finite(name, matrix)
    short = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT).double()  # (m, n)
    if precision >= RESOLVED:
        e, u = eigh_psd(short @ short.mT, name)  # (m,), (m, m)
        s, u = e.sqrt().flip(0), u.flip(1)
    else:
        u, s, _ = svd(short, name)
    k = int((s > precision * (float(s[0]) if size is None else size)).sum())
    return s[:k], u[:, :k], short
