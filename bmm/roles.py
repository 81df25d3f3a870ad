"""What a module does in its block, read from the names of the common libraries.

The roles: q, k, v, o, qkv (fused), gate, up, down, gate_up (fused), fc1, fc2, router, patch, embed, norm and head. A
name that no library is known for is its own role, so that unlike modules never share one by accident. A recipe's
``group`` overrides what comes out: PATTERN=GROUP.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

# Ordered: the first pattern found in the module's lower-case path gives the role.
_PATTERNS: tuple[tuple[str, str], ...] = (
    (r"(^|[._])(layer_?norm|layrnorm|rms_?norm|norm|ln|bn)(\d+|_\w+)?$", "norm"),
    (r"(patch_embed(ding)?s?\.proj(ection)?|patch_embed(ding)?s?)$", "patch"),
    (
        r"(^|\.)(wte|wpe|shared|embed_tokens|embed_positions|embed_in|tok_embeddings|pos_embed|position_ids|"
        r"relative_attention_bias|[a-z_]*embeddings?|[a-z_]+_token|latent_queries)$",
        "embed",
    ),
    (r"(moe|mlp|ffn|feed_forward)\.(gate|router)(\.(classifier|layer|weight))?$", "router"),
    (r"(^|[._])(router|shared_expert_gate)(\.(classifier|layer|proj))?$", "router"),
    (r"(^|\.)experts\.([a-z_]*\d+\.)?w1$", "gate"),
    (r"(^|\.)experts\.([a-z_]*\d+\.)?w3$", "up"),
    (r"(^|\.)experts\.([a-z_]*\d+\.)?w2$", "down"),
    (r"(^|\.)experts\.([a-z_]*\d+\.)?wi$", "fc1"),
    (r"(^|\.)experts\.([a-z_]*\d+\.)?wo$", "fc2"),
    (r"(attention|attn|self)\.(query|q|q_lin|wq|query_proj)$", "q"),
    (r"(attention|attn|self)\.(key|k|k_lin|wk|key_proj)$", "k"),
    (r"(attention|attn|self)\.(value|v|v_lin|wv|value_proj)$", "v"),
    (r"(selfattention|encdecattention)\.(q|k|v|o)$", r"\2"),
    (r"(attn|attention)\.(c_attn|qkv|query_key_value|qkv_proj|in_proj|wqkv)$", "qkv"),
    (r"(attn|attention)\.(c_proj|proj|dense|out_proj|o_proj|o|out_lin|wo)$", "o"),
    (r"attention\.output\.dense$", "o"),
    (r"intermediate\.dense$", "fc1"),
    (r"output\.dense$", "fc2"),
    (r"(mlp|ffn|feed_forward)\.(c_fc|fc1|lin1|wi|w1|dense_h_to_4h|fc_in|linear_1|0)$", "fc1"),
    (r"(mlp|ffn|feed_forward)\.(c_proj|fc2|lin2|wo|w2|dense_4h_to_h|fc_out|linear_2|proj|3)$", "fc2"),
    (r"densereludense\.(wi|wi_0)$", "fc1"),
    (r"densereludense\.wi_1$", "up"),
    (r"densereludense\.wo$", "fc2"),
    (r"(^|\.)gate_up_proj$", "gate_up"),
    (r"mlp\.weights_in$", "gate_up"),
    (r"mlp\.weights_out$", "down"),
    (r"(^|\.)(gate|up|down)_proj$", r"\2"),
    (r"(^|\.)(q|k|v|o)_proj$", r"\2"),
    (
        r"(^|\.)(classifier|cls_classifier|distillation_classifier|lm_head|mlp_head|embed_out|qa_outputs|score|heads|"
        r"predictions)(\.|$)",
        "head",
    ),
    (r"(^|\.)(head|head_dist|fc)$", "head"),
    (r"(^|\.)head\.fc$", "head"),
)

# Last words that mean one thing alone and another beside a sibling: with w3, w1 is the gate of a gated MLP.
_SIBLINGS: tuple[tuple[str, dict[str, str]], ...] = (
    ("w3", {"w1": "gate", "w3": "up", "w2": "down"}),
    ("w12", {"w12": "gate_up", "w3": "down"}),
)


def module_of(parameter: str) -> str:
    """'blocks.0.attn.q.weight' -> 'blocks.0.attn.q'; 'attn.in_proj_weight' -> 'attn.in_proj'."""
    for suffix in (".weight", ".bias"):
        if parameter.endswith(suffix):
            return parameter.removesuffix(suffix)
    return re.sub(r"_(weight|bias)$", "", parameter)


def role_of(parameter: str) -> str:
    """The role of the module a parameter belongs to, from its name alone."""
    module = module_of(parameter)
    plain = module.lower()
    for pattern, role in _PATTERNS:
        found = re.search(pattern, plain)
        if found:
            return found.expand(role)
    words = [w for w in module.split(".") if not w.isdigit()]
    if not words:
        return module
    generic = {"dense", "proj", "linear", "fc", "conv", "layer"}
    return ".".join(words[-2:]) if words[-1].lower() in generic and len(words) > 1 else words[-1]


def roles_of(parameters: Iterable[str]) -> dict[str, str]:
    """The role of every parameter, its siblings considered: ``w1`` is a gate where the same MLP has a ``w3``."""
    names = list(parameters)
    modules = {module_of(name) for name in names}
    return {name: _beside(module_of(name), modules) or role_of(name) for name in names}


def _beside(module: str, modules: Collection[str]) -> str:
    parent, _, last = module.rpartition(".")
    for telling, roles in _SIBLINGS:
        if last in roles and f"{parent}.{telling}" in modules and all(f"{parent}.{word}" in modules for word in roles):
            return roles[last]
    return ""


def conv1d_weights(config: Mapping[str, object] | None, parameters: Iterable[str]) -> list[str]:
    """The weights that are stored (in, out), as transformers' Conv1D stores them: GPT-2 and its kin, by ``config``'s
    ``model_type``."""
    if (config or {}).get("model_type") not in CONV1D_MODELS:
        return []
    return [n for n in parameters if n.endswith(".weight") and module_of(n).rpartition(".")[2] in _CONV1D_MODULES]


CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
