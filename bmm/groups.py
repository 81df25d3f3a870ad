"""From parameter names to module roles, depth and search groups.

A role is what a module does in its block: q, k, v, o, fc1, fc2, gate, up, down, patch, conv1, ... Names of the
common libraries are mapped to one vocabulary; an unknown name is its own role. Depth is the index of the block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from .errors import RecipeError, did_you_mean

SCHEMES = ("global", "depth", "role", "bands", "module")

# Ordered: the first pattern found at the end of the module's path gives the role.
_ROLES: tuple[tuple[str, str], ...] = (
    (r"(attention|attn|self)\.(query|q|q_proj|q_lin|wq)$", "q"),
    (r"(attention|attn|self)\.(key|k|k_proj|k_lin|wk)$", "k"),
    (r"(attention|attn|self)\.(value|v|v_proj|v_lin|wv)$", "v"),
    (r"(selfattention|encdecattention)\.(q|k|v|o)$", r"\2"),
    (r"(attn|attention)\.(c_attn|qkv|query_key_value|qkv_proj|in_proj|wqkv)$", "qkv"),
    (r"(attn|attention)\.(c_proj|proj|dense|out_proj|o_proj|o|out_lin|wo)$", "o"),
    (r"attention\.output\.dense$", "o"),
    (r"self_attn\.(out_proj|o_proj)$", "o"),
    (r"intermediate\.dense$", "fc1"),
    (r"output\.dense$", "fc2"),
    (r"(mlp|ffn|feed_forward)\.(c_fc|fc1|lin1|wi|w1|dense_h_to_4h|fc_in)$", "fc1"),
    (r"(mlp|ffn|feed_forward)\.(c_proj|fc2|lin2|wo|w2|dense_4h_to_h|fc_out|proj)$", "fc2"),
    (r"(densereludense)\.(wi|wi_0)$", "fc1"),
    (r"(densereludense)\.wi_1$", "up"),
    (r"(densereludense)\.wo$", "fc2"),
    (r"(^|\.)(gate|up|down)_proj$", r"\2"),
    (r"(patch_embed(ding)?s?\.proj(ection)?|patch_embed(ding)?)$", "patch"),
    (r"(^|\.)(q|k|v|o)_proj$", r"\2"),
)


def module_of(parameter: str) -> str:
    """'blocks.0.attn.q.weight' -> 'blocks.0.attn.q'; 'attn.in_proj_weight' -> 'attn.in_proj'."""
    for suffix in (".weight", ".bias"):
        if parameter.endswith(suffix):
            return parameter.removesuffix(suffix)
    return re.sub(r"_(weight|bias)$", "", parameter)


def role_of(parameter: str) -> str:
    """The role of the module a parameter belongs to."""
    module = module_of(parameter)
    plain = module.lower()
    for pattern, role in _ROLES:
        found = re.search(pattern, plain)
        if found:
            return found.expand(role)
    words = [w for w in module.split(".") if not w.isdigit()]
    if not words:
        return module
    generic = {"dense", "proj", "linear", "fc", "conv", "layer"}
    return ".".join(words[-2:]) if words[-1].lower() in generic and len(words) > 1 else words[-1]


def depth_of(parameter: str) -> int | None:
    """The first integer in a module's path, or None: 'blocks.3.mlp.fc1.weight' -> 3."""
    for word in parameter.split("."):
        if word.isdigit():
            return int(word)
    return None


def relative_depths(parameters: Iterable[str]) -> dict[str, float]:
    """Where in the model each parameter sits: 0 for the first block and what feeds it, 1 for the last and what follows.

    What carries no block index counts as input (0) if its name speaks of embeddings, patches, positions or a stem, and
    as output (1) otherwise; a model without any block is all 1.
    """
    names = list(parameters)
    ranks = {d: n for n, d in enumerate(sorted({d for d in map(depth_of, names) if d is not None}))}

    def place(name: str) -> float:
        depth = depth_of(name)
        if depth is not None:
            return ranks[depth] / max(len(ranks) - 1, 1) if len(ranks) > 1 else 1.0
        return 0.0 if ranks and _ENTRANCE.search(name.lower()) else 1.0

    return {name: place(name) for name in names}


_ENTRANCE = re.compile(r"emb|patch|stem|cls|class_token|pos_|position|conv1|ln_pre|pre_layer|prenet|wte|wpe|token")


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
    depths = sorted({d for d in map(depth_of, names) if d is not None})
    rank = {d: n for n, d in enumerate(depths)}

    def group(name: str) -> str:
        if scheme == "global":
            return "all"
        if scheme == "module":
            return module_of(name)
        depth = depth_of(name)
        if scheme == "role" or (depth is None and scheme == "bands"):
            return role_of(name)
        if depth is None:
            return "outside"
        band = rank[depth] * min(bands, len(depths)) // len(depths)
        return f"depth.{band}" if scheme == "depth" else f"{role_of(name)}.{band}"

    groups = {name: group(name) for name in names}
    for pattern, target in (overrides or {}).items():
        hits = [n for n in names if fnmatchcase(n, pattern)]
        if not hits:
            raise RecipeError(
                f"group override {pattern!r} matches no merged module", f"modules: {', '.join(sorted(names)[:6])}, ..."
            )
        groups.update(dict.fromkeys(hits, target))
    return groups
