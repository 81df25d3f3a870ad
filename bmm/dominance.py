"""Which of several points are on their Pareto front."""

from __future__ import annotations

from collections.abc import Sequence


def non_dominated(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices, ascending, of the points that no other point beats: is as high everywhere and higher somewhere.

    Of equal points the first stands for all.
    """

    def beaten(i: int) -> bool:
        return any(
            all(a >= b for a, b in zip(other, points[i], strict=True)) and (list(other) != list(points[i]) or j < i)
            for j, other in enumerate(points)
            if j != i
        )

    return [i for i in range(len(points)) if not beaten(i)]
