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


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (o >= r) or rows (o < r): ``p @ qh`` of the thin SVD."""
    p, _, qh = svd(matrix)
    return p @ qh
