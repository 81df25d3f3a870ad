"""What a checkpoint is made of, and what BMM would do with it: modules by role, shape and depth."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .checkpoint import TensorInfo
from .groups import blocks_of
from .layouts import solvable
from .roles import module_of, roles_of

SOLVED, JOINED, ANCHOR, BASE = "solved", "with its weight", "anchor", "base"


@dataclass(frozen=True)
class Entry:
    """Tensors of one kind.

    ``role`` as in `bmm.roles`, with ".bias" for biases; ``depth`` the blocks they are in ("0-11", "" outside of all);
    ``merged``: "solved" by the regression, "with its weight" (a bias: solved too where data Grams allow it), "anchor"
    (what the anchor makes of it) or "base" (no floating numbers: not merged). ``tied``: it stands for others too.
    """

    role: str
    shape: tuple[int, ...]
    depth: str
    tensors: int
    parameters: int
    dtype: str
    merged: str
    tied: bool
    first: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"shape": list(self.shape)}


def inventory(
    infos: Mapping[str, TensorInfo], config: Mapping[str, object] | None = None, tied: Sequence[Sequence[str]] = ()
) -> list[Entry]:
    """The tensors of a checkpoint by kind, in the order of the model: what feeds the blocks, blocks, what follows.

    ``infos``: shape and dtype by name; ``config``: the folder's config.json; ``tied``: groups of names for one
    parameter, each counted under its first.
    """
    again = {name for group in tied for name in group[1:]}
    names = [name for name in infos if name not in again]
    roles, blocks = roles_of(names), blocks_of(names)
    layouts = solvable({n: infos[n].shape for n in names if infos[n].floating}, config, tied)
    partners = {module_of(name) for name in layouts}
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for name in names:
        info = infos[name]
        bias = name.endswith("bias") and len(info.shape) == 1
        merged = BASE if not info.floating else SOLVED if name in layouts else ANCHOR
        if bias and module_of(name) in partners and info.floating:
            merged = JOINED
        role = f"{roles[name]}.bias" if bias else roles[name]
        dtype = str(info.dtype).removeprefix("torch.")
        outside = None if blocks[name] else name if merged == BASE else roles[name]
        kinds.setdefault((role, info.shape, dtype, merged, _tied(name, tied), outside), []).append(name)
    entries = [
        Entry(role, tuple(shape), _depths(blocks, members), len(members), sum(infos[n].numel for n in members), dtype,
              merged, is_tied, members[0])
        for (role, shape, dtype, merged, is_tied, _), members in kinds.items()
    ]  # fmt: skip
    return sorted(entries, key=lambda e: (_ORDER.get(e.role.removesuffix(".bias"), 50), e.role, e.first))


_ORDER = {
    role: n
    for n, role in enumerate(
        ("patch", "embed", "q", "k", "v", "qkv", "o", "fc1", "fc2", "gate", "up", "gate_up", "down", "router")
    )
} | {"norm": 90, "head": 99}


def _tied(name: str, tied: Sequence[Collection[str]]) -> bool:
    return any(name in group for group in tied)


def _depths(blocks: Mapping[str, tuple[int, ...] | None], names: Iterable[str]) -> str:
    """The blocks of some tensors: "0-11", "1, 3", "encoder 0-5, decoder 0-5"."""
    places = {p for n in names if (p := blocks[n]) is not None}
    both = {p[0] for p in blocks.values() if p is not None} == {0, 1}
    texts = []
    for half, word in ((0, "encoder "), (1, "decoder ")):
        numbers = sorted({p[1] for p in places if p[0] == half})
        if numbers:
            texts.append((word if both else "") + ", ".join(_ranges(numbers)))
    return ", ".join(texts)


def _ranges(numbers: Sequence[int]) -> list[str]:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
