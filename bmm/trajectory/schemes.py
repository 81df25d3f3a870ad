"""Which checkpoints an average takes, and with what weights: every scheme is a weighted sum.

uniform   mean of the last k, or of the last share, of the checkpoints
ema       m_1 = W_1, m_j = decay m_{j-1} + (1 - decay) W_j, over the checkpoints in order
lawa      mean of the k latest of every n-th checkpoint (Latest Weight Averaging, arXiv 2209.14981)
swa       uniform, after which BatchNorm statistics are measured anew (arXiv 1803.05407)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from ..errors import RecipeError, did_you_mean

METHODS: dict[str, tuple[str, ...]] = {
    "uniform": ("last", "share"),
    "ema": ("decay",),
    "lawa": ("window", "interval", "each"),
    "swa": ("last", "share"),
}
"""Method -> the options it takes."""


@dataclass(frozen=True)
class Scheme:
    """A method of averaging and its options; None where an option is not given.

    Args:
        method: a key of `METHODS`.
        last: average the last so many checkpoints (all by default).
        share: or the last share of them, rounded up, in (0, 1].
        decay: of the exponential average per *checkpoint*, in [0, 1); 0.9 by default. A decay of b a training step is
            b ** n for checkpoints n steps apart.
        window: checkpoints in a window, 6 by default as in the paper.
        interval: a window takes every so many-th checkpoint, counted back from the newest; 1 by default.
        each: write every full window, oldest first, in place of the newest alone.

    Raises `RecipeError` for an unknown method, an option that is not the method's, or a value out of range.
    """

    method: str = "uniform"
    last: int | None = None
    share: float | None = None
    decay: float | None = None
    window: int | None = None
    interval: int | None = None
    each: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RecipeError(f"no averaging method {self.method!r}", did_you_mean(self.method, METHODS))
        for option in self.options():
            if option not in METHODS[self.method]:
                owners = " and ".join(name for name, own in METHODS.items() if option in own)
                raise RecipeError(f"{self.method} takes no {option}", f"{option} belongs to {owners}")
        for name in ("last", "window", "interval"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or value != int(value) or value < 1):
                raise RecipeError(f"{name} is {value}", "a whole number, at least 1")
        if self.last is not None and self.share is not None:
            raise RecipeError("last and share exclude each other", "give one of the two")
        if self.share is not None and not 0 < self.share <= 1:
            raise RecipeError(f"share is {self.share}", "above 0, at most 1 (all checkpoints)")
        if self.decay is not None and not 0 <= self.decay < 1:
            raise RecipeError(f"decay is {self.decay}", "from 0 (the last checkpoint alone) to below 1")

    def options(self) -> dict[str, Any]:
        """The options that were given."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name != "method" and getattr(self, field.name) not in (None, False)
        }

    def plans(self, count: int) -> list[dict[int, float]]:
        """Weights, which sum to 1, by the index of a checkpoint (0 the oldest), one mapping an average to make.

        Raises `RecipeError` where ``count`` checkpoints are too few.
        """
        if self.method == "ema":
            decay = 0.9 if self.decay is None else self.decay
            weights = {j: (1 - decay if j else 1.0) * decay ** (count - 1 - j) for j in range(count)}
            return [{j: a for j, a in weights.items() if a > 0}]
        if self.method == "lawa":
            return self._windows(count)
        taken = count if self.last is None else int(self.last)
        if self.share is not None:
            taken = math.ceil(self.share * count - 1e-9)  # 0.3 of 10 is 3, whatever the rounding
        if taken > count:
            raise RecipeError(f"last is {taken}, but there are {count} checkpoints", f"at most {count}")
        return [_mean(range(count - taken, count))]

    def _windows(self, count: int) -> list[dict[int, float]]:
        size, interval = self.window or 6, self.interval or 1
        sampled = list(range(count - 1, -1, -interval))[::-1]
        if len(sampled) < size:
            raise RecipeError(
                f"a window of {size} at interval {interval} needs {(size - 1) * interval + 1} checkpoints, not {count}",
                "give more checkpoints, or a smaller --window or --interval",
            )
        windows = [_mean(sampled[end - size : end]) for end in range(size, len(sampled) + 1)]
        return windows if self.each else windows[-1:]


def _mean(indices: range | list[int]) -> dict[int, float]:
    return dict.fromkeys(indices, 1 / len(indices))
