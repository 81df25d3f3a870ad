"""From parameter names to depth and search groups.

What a module does in its block is its role (`bmm.roles`); depth is the index of the block.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .errors import RecipeError, did_you_mean
from .roles import module_of, role_of, roles_of

SCHEMES = ("global", "depth", "role", "bands", "module")
AUTO = "auto"

__all__ = [
    "AUTO", "SCHEMES", "automatic_groups", "blocks_of", "depth_of", "module_of", "relative_depths", "role_of",
    "roles_of", "search_groups",
]  # fmt: skip


@dataclass(frozen=True, order=True)
class _Block:
    """The block a parameter belongs to: a chain of blocks, and the block's place in it.

    ``place`` starts with 0 for an encoder (or a model that has one part) and 1 for the decoder that follows it; then
    one number a level: (0, 3) is block 3, (0, 2, 0) block 0 of stage 2.
    """

    chain: str
    place: tuple[int, ...]


def _block(parameter: str) -> _Block | None:
    """The block of a parameter, None for what lies outside all blocks: embeddings, final norms, heads."""
    words = parameter.lower().split(".")[:-1]
    start = next((k for k, word in enumerate(words) if _NUMBERED.fullmatch(word)), None)
    if start is None or not _HEADS.isdisjoint(words[:start]):
        return None
    levels = words[start : start + 2]
    if start and words[start - 1] in _STAGES and words[start + 1 : start + 2] and words[start + 1] in _STAGES:
        levels = words[start : start + 3 : 2]  # stages.0.blocks.1
    numbers = [int(found[1]) for word in levels if (found := _NUMBERED.fullmatch(word))]
    chain = ".".join("encoder" if word == "decoder" else word for word in words[:start])
    return _Block(chain, (int("decoder" in words[:start]), *numbers))


def blocks_of(parameters: Iterable[str]) -> dict[str, tuple[int, ...] | None]:
    """Each parameter's block: 0 (encoder, or the only part) or 1 (decoder), then one number a level; None outside."""
    blocks = {name: _block(name) for name in parameters}
    return {name: None if block is None else block.place for name, block in blocks.items()}


def depth_of(parameter: str) -> int | None:
    """The number of a parameter's block (of its stage, where blocks come in stages): 'blocks.3.mlp.fc1.weight' -> 3.

    None for what lies outside all numbered blocks, heads included.
    """
    block = _block(parameter)
    return None if block is None else block.place[1]


def relative_depths(parameters: Iterable[str]) -> dict[str, float]:
    """Where in the model each parameter sits: 0 for the first block and what feeds it, 1 for the last and what follows.

    Blocks count in order of stage and block (``layer2.0`` of a ResNet follows ``layer1.2``), a decoder's after its
    encoder's. Towers side by side (image and text) each run from 0 to 1. What belongs to no block counts as input (of
    its encoder or decoder) where the name speaks of embeddings, patches, positions or a stem, and as output otherwise.
    A model without blocks is all 1, as is a single block.
    """
    blocks = {name: _block(name) for name in parameters}
    chains: dict[str, set[tuple[int, ...]]] = {}
    for block in blocks.values():
        if block:
            chains.setdefault(block.chain, set()).add(block.place)
    # (0, 2) beside (0, 2, 0) is part of the stage, not a block: it gets the depth of the stage's first block.
    order = {
        chain: sorted(p for p in places if not any(p == other[: len(p)] for other in places if other != p))
        for chain, places in chains.items()
    }

    def inside(block: _Block) -> float:
        places = order[block.chain]
        return bisect_left(places, block.place) / (len(places) - 1) if len(places) > 1 else 1.0

    halves: dict[str, list[float]] = {"encoder": [], "decoder": []}
    for block in blocks.values():
        if block:
            halves["decoder" if block.place[0] else "encoder"].append(inside(block))

    def outside(name: str) -> float:
        entrance = bool(_ENTRANCE.search(name.lower())) and bool(order)
        half = next((h for h in halves if h in name.lower().split(".")), "")
        if all(halves.values()) and half:
            return min(halves[half]) if entrance else max(halves[half])
        return 0.0 if entrance else 1.0

    return {name: inside(block) if block else outside(name) for name, block in blocks.items()}


def automatic_groups(
    weights: Iterable[str], parameters: int, overrides: Mapping[str, str] | None = None
) -> tuple[str, int]:
    """The finest scheme, and its bands, whose groups have at most that many parameters, two a group.

    Role within as many depth bands as fit, else role, else depth bands alone, else one group. `Run` calls it with a
    third of the budget: a search of d parameters wants three trials for each.
    """
    names = list(weights)
    fits = parameters // 2
    depths = {block.place for name in names if (block := _block(name))}
    counts = range(len(depths), 1, -1)
    candidates = [("bands", b) for b in counts] + [("role", 1)] + [("depth", b) for b in (*counts, 1)]
    for scheme, bands in candidates:
        if len(set(search_groups(names, scheme, bands, overrides).values())) <= fits:
            return scheme, bands
    return "global", 1


REFINABLE = "choose groups: depth, role, bands or module (auto needs a budget for more than one), or drop refine"


def coarser_groups(
    groups: Mapping[str, str], scheme: str, overrides: Mapping[str, str] | None = None
) -> list[dict[str, str]]:
    """Nested coarsenings of a grouping, coarsest first: all groups in one, then one a role where roles are split.

    ``groups`` is what `search_groups` made of the weights by ``scheme`` and ``overrides``. Each coarsening gives every
    group the name of the coarse group it belongs to; an overriding group of several roles joins these.
    Raises `RecipeError` where there is but one group.
    """
    fine = dict.fromkeys(groups.values())
    if len(fine) < 2:
        raise RecipeError("nothing to refine: all modules share one group", REFINABLE)
    found = [dict.fromkeys(fine, "all")]
    if scheme in ("bands", "module"):
        roles = _joined(groups, search_groups(groups, "role", 1, overrides))
        if 1 < len(set(roles.values())) < len(fine):
            found.append(roles)
    return found


def _joined(groups: Mapping[str, str], roles: Mapping[str, str]) -> dict[str, str]:
    """The finest coarsening of ``groups`` in which each role of the weights lies in one part, named after its roles."""
    parts: list[tuple[set[str], set[str]]] = []  # groups, and roles in them
    for weight, group in groups.items():
        touched = [part for part in parts if group in part[0] or roles[weight] in part[1]]
        joined = {group}.union(*(g for g, _ in touched)), {roles[weight]}.union(*(r for _, r in touched))
        parts = [part for part in parts if part not in touched] + [joined]
    names = {group: "+".join(sorted(within)) for members, within in parts for group in members}
    return {group: names[group] for group in dict.fromkeys(groups.values())}


_NUMBERED = re.compile(r"(?:(?:encoder_|decoder_)?layer_?|stage_?|block_?|group_?|res|denseblock_?|denselayer_?)?(\d+)")
"""A number, or a block's name that ends in one: 3, layer1, encoder_layer_11, denseblock2."""
_STAGES = frozenset({"layers", "stages", "blocks"})
"""Of two containers of these names one within the other, the first holds stages and the second their blocks."""
_HEADS = frozenset({"classifier", "head", "heads", "mlp_head", "lm_head", "fc", "pooler", "score", "predictions"})
_ENTRANCE = re.compile(
    r"emb|patch|stem|conv_proj|cls_token|class_token|token_type|_token|pos_|position|ln_pre|norm_pre|pre_la|prenet|wte|wpe"
    r"|shared\.|(?:^|\.)(?:conv|bn|norm)[01]\.|coder\.conv\d"
)


def search_groups(
    weights: Iterable[str],
    scheme: str = "depth",
    bands: int = 4,
    overrides: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The search group of each weight.

    ``scheme``: "global" (one group), "depth" (``bands`` bands of blocks, and one group for what is outside the blocks),
    "role", "bands" (role within a depth band) or "module" (one each).
    ``overrides`` maps glob patterns of parameter names to group names and wins over the scheme.
    Raises `RecipeError` for an unknown scheme, fewer than one band, or an override that matches nothing.
    """
    names = list(weights)
    if scheme not in SCHEMES:
        raise RecipeError(f"no grouping scheme {scheme!r}", did_you_mean(scheme, SCHEMES))
    if bands < 1:
        raise RecipeError(f"bands must be at least 1, not {bands}", "use groups: global for a single band")
    depth = relative_depths(names)
    depths = sorted({depth[name] for name in names if _block(name)})
    rank = {d: n for n, d in enumerate(depths)}
    roles = roles_of(names)

    def group(name: str) -> str:
        if scheme == "global":
            return "all"
        if scheme == "module":
            return module_of(name)
        within = _block(name) is not None
        if scheme == "role" or (scheme == "bands" and not within):
            return roles[name]
        if not within:
            return "outside"
        band = rank[depth[name]] * min(bands, len(depths)) // len(depths)
        return f"depth.{band}" if scheme == "depth" else f"{roles[name]}.{band}"

    groups = {name: group(name) for name in names}
    for pattern, target in (overrides or {}).items():
        hits = [n for n in names if fnmatchcase(n, pattern)]
        if not hits:
            raise RecipeError(
                f"group override {pattern!r} matches no merged module", f"modules: {', '.join(sorted(names)[:6])}, ..."
            )
        groups.update(dict.fromkeys(hits, target))
    return groups
