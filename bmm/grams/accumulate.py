"""Streaming Grams ``x.T @ x / n``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import GramError
from ..linalg import all_finite

FLOAT64_LIMIT = 4096
"""Largest dimension accumulated in float64 on the CPU: beyond it a Gram would need over 128 MiB."""

CHUNK_ROWS = 2048
"""Rows widened at a time, so that an update's extra memory does not grow with the batch."""

PANEL = 384
"""Rows of the Gram that are added to at a time, each from its diagonal on: what lies below is never computed."""


def gram_dtype(dim: int, device: torch.device | str = "cpu") -> torch.dtype:
    """The precision a Gram (dim, dim) is kept in: float64 on the CPU up to `FLOAT64_LIMIT`, float32 otherwise."""
    on_cpu = torch.device(device).type == "cpu"
    return torch.float64 if on_cpu and dim <= FLOAT64_LIMIT else torch.float32


class GramAccumulator:
    """Sums ``x.T @ x`` over batches of inputs ``x`` (..., dim).

    ``homogeneous`` appends a constant 1 to every input, so that the Gram is (dim + 1, dim + 1) and a bias can join its
    weight as one more column. ``dtype`` is that of the sum (see `gram_dtype`), ``device`` where it lives.
    """

    def __init__(
        self,
        dim: int,
        homogeneous: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.dim = dim
        self.homogeneous = homogeneous
        self.count = 0
        side = dim + homogeneous
        with torch.inference_mode(False):  # a sum born in inference mode could not grow outside it
            # (i, i), of which the part below the panels' diagonal blocks stays 0
            self._sum = torch.zeros(side, side, dtype=dtype or gram_dtype(dim, device), device=device)

    def update(self, x: Tensor) -> None:
        """Add a batch (..., dim); any leading shape, any floating dtype. Raises `GramError` for another last size."""
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise GramError(f"inputs have shape {tuple(x.shape)}", f"the last size must be {self.dim}")
        rows = x.detach().reshape(-1, self.dim)  # (n, i)
        # autocast would quietly compute a float32 product in bfloat16
        with torch.no_grad(), torch.autocast(self._sum.device.type, enabled=False):
            for chunk in rows.split(CHUNK_ROWS):
                wide = self._sum.new_empty(len(chunk), len(self._sum))  # (n, i) or (n, i + 1)
                wide[:, : self.dim] = chunk
                wide[:, self.dim :] = 1
                for start in range(0, len(self._sum), PANEL):
                    panel = slice(start, min(start + PANEL, len(self._sum)))
                    self._sum[panel, start:].addmm_(wide[:, panel].mT, wide[:, start:])
        self.count += len(rows)

    def add(self, other: GramAccumulator) -> None:
        """Add everything another accumulator of the same kind has seen."""
        if (other.dim, other.homogeneous) != (self.dim, self.homogeneous):
            raise GramError(f"cannot add Grams of {other.dim} and {self.dim} inputs", "accumulate them separately")
        self._sum += other._sum.to(self._sum)
        self.count += other.count

    def copy(self) -> GramAccumulator:
        """An independent accumulator with the same sum and count."""
        twin = GramAccumulator(self.dim, self.homogeneous, self._sum.dtype, self._sum.device)
        twin.add(self)
        return twin

    def gram(self) -> Tensor:
        """The Gram (i, i), or (i + 1, i + 1) where homogeneous; zeros before any input.

        Raises `GramError` where an input was NaN, infinite, or so large that its square overflowed.
        """
        return self.copy().finish()

    def finish(self) -> Tensor:
        """`gram`, in the memory of the sum: nothing can be added to it any more."""
        gram = self._sum.div_(max(self.count, 1))  # (i, i)
        for start in range(PANEL, len(gram), PANEL):
            panel = slice(start - PANEL, start)
            gram[start:, panel] = gram[panel, start:].mT
        if not all_finite(gram):
            raise GramError("a Gram holds non-finite values", "look for NaN or overflow in the calibration inputs")
        return gram
