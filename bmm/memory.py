"""How much memory a merge will take at its peak, estimated from shapes before anything is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from . import anchors
from .anchors.inputs import DEVICE_PIECE, PIECE
from .checkpoint import ModelPool
from .checkpoint.staging import AHEAD
from .errors import RecipeError
from .layouts import matrix_layouts
from .recipe import Recipe

DOUBLE, SINGLE = 8, 4


def require_memory(recipe: Recipe, pool: ModelPool, what: str) -> None:
    """Raises `RecipeError` where the recipe's ``max_memory`` is less than the estimate for ``what``.

    ``what``: "plain" (the anchor alone), "merge" (BMM at one point) or "tune".
    """
    if not recipe.max_memory:
        return
    needed, where = estimate(recipe, pool, what)
    if needed > recipe.max_memory * 2**30:
        hint = {
            "plain": "give more memory, or take a method that works entry by entry",
            "merge": "give more memory: it is one module's matrices",
            "tune": "give more memory, leave modules out with skip, or `bmm merge --lam`, which holds one module",
        }[what]
        raise RecipeError(
            f"needs about {needed / 2**30:.2f} GiB for {where}, and max_memory is {recipe.max_memory:g}", hint
        )


def estimate(recipe: Recipe, pool: ModelPool, what: str) -> tuple[float, str]:
    """Bytes at the peak, and what takes them; the interpreter and its libraries (0.3 GiB) are not counted."""
    sizes = {name: pool.info(name).numel for name in pool.float_names}
    largest = max(sizes, key=lambda name: sizes[name])
    plain = _plain(recipe, len(pool), sizes[largest]) + _staged(recipe, pool, what), largest
    if what == "plain":
        return plain
    matrices = dict(_matrices(pool, matrix_layouts(pool, None)))
    if what == "merge":
        # Of the weight's size: base, anchor, expert, difference, target, right side, solution; and four Grams. A
        # quarter more is what libraries' buffers took at most in twenty runs.
        each = {name: 1.25 * DOUBLE * (7.0 * o * i + 4.0 * i * i) for name, (o, i) in matrices.items()}
        name = max(each, key=lambda n: each[n], default=largest)
        return max(plain, (each.get(name, 0.0) + _staged(recipe, pool, what), name))
    # Base, anchor, regression, the anchor's two parts, merged weight, and the basis; the rest of the model twice.
    held = sum(SINGLE * (6.0 * o * i + i * i) for o, i in matrices.values())
    rest = SINGLE * 2.0 * sum(count for name, count in sizes.items() if name not in matrices)
    anchor = SINGLE * float(sum(sizes.values()))
    return max(plain, (held + rest + anchor, f"{len(matrices)} modules prepared for trials"))


def _plain(recipe: Recipe, experts: int, largest: int) -> float:
    """The anchor's own peak: pieces, or three times the largest tensor of all experts."""
    if recipe.anchor.startswith("path:"):
        return SINGLE * 2.0 * largest
    if anchors.get(recipe.anchor).elementwise:
        return SINGLE * (2.0 * largest + 8.0 * (experts + 2) * PIECE)
    return SINGLE * 3.0 * experts * largest


def _staged(recipe: Recipe, pool: ModelPool, what: str) -> float:
    """Page-locked memory of what is read ahead for a GPU: what waits, what is read and what is copied, in blocks of
    powers of two."""
    if not recipe.device.startswith("cuda"):
        return 0.0
    most = max(pool.info(name).nbytes for name in pool.float_names)
    if what == "plain" and not recipe.anchor.startswith("path:") and anchors.get(recipe.anchor).elementwise:
        most = min(most, DOUBLE * DEVICE_PIECE)
    item = (len(pool) + 1.0) * most
    return 2 * (max(AHEAD, item) + 2 * item)


def _matrices(pool: ModelPool, layouts: Mapping[str, str]) -> Iterable[tuple[str, tuple[int, int]]]:
    """(name, (outputs, inputs)) of the weights that BMM solves."""
    for name, layout in layouts.items():
        shape = pool.shape(name)
        inputs = shape[0] if layout == "conv1d" else pool.info(name).numel // shape[0]
        yield name, (pool.info(name).numel // inputs, inputs)
