"""Symmetric matrices as their upper triangles: half of what a cache of Grams would take."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import GramError


def packed(matrix: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix (n, n), row after row: (n (n + 1) / 2,)."""
    n = len(matrix)
    triangle = torch.empty(n * (n + 1) // 2, dtype=matrix.dtype)  # (n (n + 1) / 2,)
    start = 0
    for row in range(n):
        triangle[start : start + n - row] = matrix[row, row:]
        start += n - row
    return triangle


def unpacked(triangle: Tensor) -> Tensor:
    """The matrix (n, n) of an upper triangle. Raises `GramError` for a length that no triangle has."""
    n = (math.isqrt(8 * len(triangle) + 1) - 1) // 2
    if triangle.dim() != 1 or n * (n + 1) // 2 != len(triangle):
        raise GramError(f"{tuple(triangle.shape)} numbers are no triangle", "the Gram cache is damaged: delete it")
    matrix = torch.empty(n, n, dtype=triangle.dtype)  # (n, n)
    start = 0
    for row in range(n):
        matrix[row, row:] = triangle[start : start + n - row]
        start += n - row
    for row in range(0, n, _BLOCK):  # the lower half, block by block: a column at a time would miss the cache
        for column in range(0, row + 1, _BLOCK):
            block = matrix[column : column + _BLOCK, row : row + _BLOCK]  # (b, b)
            if row == column:
                block.copy_(block.triu() + block.triu(1).T)
            else:
                matrix[row : row + _BLOCK, column : column + _BLOCK] = block.T
    return matrix


_BLOCK = 256
