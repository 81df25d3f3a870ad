"""Permutation groups of transformer blocks, read from parameter names, shapes and config.json.

Hidden units of an MLP, gated or not, and attention heads; with grouped queries the key-value heads with their queries.
The residual stream stays as it is. A block is left alone, with a notice, as soon as something in it is not understood:
a parameter that may belong to a head (relative positions, sinks), fused layouts that differ between models, or no head
count. Nothing here is guessed from a shape alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import RecipeError
from ..roles import CONV1D_MODELS, module_of, role_of
from .spec import Group, Site, Spec

Within = Literal["none", "vo", "qkvo"]
WITHIN: tuple[Within, ...] = ("none", "vo", "qkvo")
Shapes = Mapping[str, tuple[int, ...]]

_ALIASES = {"linear1": "fc1", "linear2": "fc2", "w1": "fc1", "w2": "fc2", "w3": "up", "gate_up_proj": "gate_up"}
_ATTENTION = ("q", "k", "v", "o", "qkv")
_MLP = ("fc1", "fc2", "gate", "up", "down", "gate_up")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "heads", "encoder_attention_heads")
_INTERLEAVED = {"gpt_neox", "gpt_neox_japanese"}
_ROTARY = ("rope_theta", "rope_parameters", "rope_scaling", "rotary_dim", "rotary_pct", "partial_rotary_factor")
# Things that differ from head to head and are shared by blocks or computed: no permutation of heads is safe with them.
_PER_HEAD = re.compile(r"relative_attention_bias|relative_position|rel_pos|rel_embed|alibi|slopes|position_bias")
_BUFFERS = re.compile(r"(inv_freq|masked_bias|rotary_emb\..*|position_ids|attn\.bias|attention\.bias)$")
_QK_NORM = re.compile(r"(^|[._])(q|k|query|key)_?(layer)?_?norm")


@dataclass(frozen=True)
class Transformer:
    """What is known of a model: shapes by name, config.json, weights stored (in, out), head count if given by hand."""

    shapes: Shapes
    config: Mapping[str, Any]
    transposed: Collection[str] = ()
    heads: int | None = None
    within: Within = "none"


def transformer_spec(model: Transformer) -> Spec:
    """Groups of all MLPs and attention blocks found, and notices about those left alone.

    ``within``: permutations inside a head too. "vo": rows of v with columns of o, always valid. "qkvo": also rows of
    q with rows of k, which holds only without rotary embeddings; a config that speaks of those is refused.

    Raises:
        RecipeError: ``within`` unknown or not valid for this model.
    """
    if model.within not in WITHIN:
        raise RecipeError(f"no within {model.within!r}", f"one of {', '.join(WITHIN)}")
    rotary = [k for s in _sections(model.config) for k in _ROTARY if s.get(k) is not None]
    rotary += [n for n in model.shapes if "rotary" in n or n.endswith("inv_freq")][:1]
    if model.within == "qkvo" and rotary:
        raise RecipeError(f"within qkvo: this model has rotary embeddings ({rotary[0]})", "use within: vo")
    groups, notices = [], []
    for build, roles, prefix in ((_attention, _ATTENTION, _attention_prefix), (_mlp, _MLP, _block_prefix)):
        for block, modules in _blocks(model.shapes, roles, prefix).items():
            try:
                groups.append(build(model, block, modules))
            except _Unknown as reason:
                units = "heads" if roles is _ATTENTION else "hidden units"
                notices.append(f"{block or 'model'}: {units} stay: {reason}")
    return Spec(tuple(groups), tuple(notices))


class _Unknown(Exception):
    """Why a block is left alone."""


def _blocks(shapes: Shapes, roles: tuple[str, ...], prefix: Any) -> dict[str, dict[str, str]]:
    """Block -> role -> module, of the modules with one of ``roles``; a role met twice makes the block unknown ('?')."""
    blocks: dict[str, dict[str, str]] = defaultdict(dict)
    for name, shape in sorted(shapes.items()):
        module = module_of(name)
        role = role_of(name)
        last = module.rpartition(".")[2]
        if role == last and last in _ALIASES:
            role = _ALIASES[last]
        if len(shape) == 2 and role in roles and name in (f"{module}.weight", f"{module}_weight"):
            found = blocks[prefix(module)]
            found["?" if role in found else role] = module
    return {k: v for k, v in sorted(blocks.items()) if {"o", "fc2", "down"} & set(v) and len(v) > 1}


def _block_prefix(module: str) -> str:
    """The path up to its last number: 'encoder.layer.3.output.dense' -> 'encoder.layer.3'."""
    parts = module.split(".")
    last = max((n for n, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])


def _attention_prefix(module: str) -> str:
    """The path up to the attention module of a block: 'layer.3.attention.self.query' -> 'layer.3.attention'."""
    parts = module.split(".")
    start = len(_block_prefix(module).split(".")) if _block_prefix(module) else 0
    for n in range(start, len(parts)):
        if "att" in parts[n].lower():
            return ".".join(parts[: n + 1])
    return ".".join(parts[:-1])


@dataclass(frozen=True)
class _Linear:
    """A linear module's stored weight and bias, whichever way round the weight lies."""

    weight: str
    bias: str
    out_axis: int
    outs: int
    ins: int

    @classmethod
    def of(cls, model: Transformer, module: str) -> _Linear:
        weight = f"{module}.weight" if f"{module}.weight" in model.shapes else f"{module}_weight"
        bias = weight.removesuffix("weight") + "bias"
        shape = model.shapes[weight]
        out_axis = 1 if _is_transposed(model, weight) else 0
        bias = bias if bias in model.shapes else ""
        if bias and model.shapes[bias] != (shape[out_axis],):
            raise _Unknown(f"{bias} does not fit {weight}")
        return cls(weight, bias, out_axis, shape[out_axis], shape[1 - out_axis])

    def rows(self, start: int = 0, levels: tuple[str, ...] = (), width: int = 1) -> list[Site]:
        """Sites of (a stretch of) the outputs."""
        names = [(self.weight, self.out_axis), *([(self.bias, 0)] if self.bias else [])]
        return [Site(name, axis, start, levels, width) for name, axis in names]

    def columns(self, levels: tuple[str, ...] = (), width: int = 1) -> list[Site]:
        """The site of the inputs."""
        return [Site(self.weight, 1 - self.out_axis, 0, levels, width)]


def _is_transposed(model: Transformer, weight: str) -> bool:
    """Whether a weight is stored (in, out) as in transformers' Conv1D."""
    if weight in model.transposed:
        return True
    return model.config.get("model_type") in CONV1D_MODELS and module_of(weight).rpartition(".")[2].startswith("c_")


def _mlp(model: Transformer, block: str, modules: Mapping[str, str]) -> Group:
    roles = set(modules)
    known = ({"fc1", "fc2"}, {"fc1", "up", "fc2"}, {"gate", "up", "down"}, {"up", "down"}, {"gate_up", "down"})
    if roles not in known:
        raise _Unknown(f"its linear layers are {', '.join(f'{r}: {m}' for r, m in sorted(modules.items()))}")
    linears = {role: _Linear.of(model, module) for role, module in modules.items()}
    last = linears.pop("fc2" if "fc2" in linears else "down")
    hidden = last.ins
    sites = last.columns()
    for role, linear in linears.items():
        halves = 2 if role == "gate_up" else 1
        if linear.outs != halves * hidden:
            raise _Unknown(f"{linear.weight} has {linear.outs} outputs, {last.weight} {hidden} inputs")
        sites += [site for half in range(halves) for site in linear.rows(start=half * hidden)]
    # Whatever else in the same module has an axis as long may act on the hidden units (a norm, a gate, a convolution).
    home = modules[next(iter(linears))].rpartition(".")[0]
    own = {module_of(n) for n in (*(x.weight for x in linears.values()), last.weight)}
    for name, shape in model.shapes.items():
        inside = name.startswith(f"{home}.") if home else "." not in module_of(name)
        if inside and hidden in shape and module_of(name) not in own and role_of(name) not in _ATTENTION:
            raise _Unknown(f"{name} may act on them")
    return Group(f"{block}.mlp".lstrip("."), hidden, tuple(sites))


def _attention(model: Transformer, block: str, modules: Mapping[str, str]) -> Group:
    if set(modules) not in ({"q", "k", "v", "o"}, {"qkv", "o"}):
        raise _Unknown(f"its linear layers are {', '.join(f'{r}: {m}' for r, m in sorted(modules.items()))}")
    odd = next((n for n in model.shapes if _PER_HEAD.search(n)), "")
    if odd or model.config.get("alibi") or model.config.get("model_type") in {"bloom", "mpt"}:
        raise _Unknown(f"positions differ from head to head ({odd or 'ALiBi'})")
    heads = model.heads or _head_count(model.config, block)
    if not heads:
        raise _Unknown("the number of heads is not known; give heads")
    linears = {role: _Linear.of(model, module) for role, module in modules.items()}
    o = linears["o"]
    if o.ins % heads:
        raise _Unknown(f"{o.ins} inputs of {o.weight} are not {heads} heads")
    size = o.ins // heads
    fused = linears.get("qkv")
    k_rows = (fused.outs - o.ins) // 2 if fused else linears["k"].outs
    kv = k_rows // size
    rows = [fused.outs] if fused else [linears[r].outs for r in "qkv"]
    if rows != ([o.ins + 2 * kv * size] if fused else [o.ins, kv * size, kv * size]) or not kv or heads % kv:
        raise _Unknown(f"{rows} rows of {', '.join(modules)} are not {heads} heads of {size} and their keys and values")
    queries = heads // kv
    norms = _extra_parameters(model, block, modules)
    shared_norm = any(model.shapes[n] == (size,) for n in norms)
    inner: dict[str, int] = {"query": queries} if queries > 1 else {}
    if model.within != "none":
        inner["vo"] = size
    if model.within == "qkvo":
        if norms:
            raise _Unknown(f"{norms[0]} stands between q and k")
        inner["qk"] = size
    where = "query" if queries > 1 else ""

    def levels(pair: str, grouped: bool) -> tuple[tuple[str, ...], int]:
        names = (*((where,) if where and grouped else ()), *((pair,) if pair in inner else ()))
        return names, 1 if pair in inner else size

    q, k, v, out = levels("qk", True), levels("qk", False), levels("vo", False), levels("vo", True)
    if fused and _interleaved(model, modules["qkv"]):
        if model.within != "none" or queries > 1:
            raise _Unknown("q, k and v are interleaved: heads move whole or not at all")
        sites = fused.rows(width=3 * size)
    elif fused:
        starts = (0, o.ins, o.ins + k_rows)
        sites = [s for start, (names, w) in zip(starts, (q, k, v), strict=True) for s in fused.rows(start, names, w)]
    else:
        sites = [s for role, (n, w) in zip("qkv", (q, k, v), strict=True) for s in linears[role].rows(0, n, w)]
    sites += o.columns(*out)
    if not shared_norm:
        sites += [Site(n, 0, 0, *(q if model.shapes[n] == (o.ins,) else k)) for n in norms]
    return Group(f"{block or 'attention'}.heads", kv, tuple(sites), inner)


def _extra_parameters(model: Transformer, block: str, modules: Mapping[str, str]) -> list[str]:
    """Norms of q and k inside an attention block; anything else that is not understood makes the block unknown."""
    own, norms = set(modules.values()), []
    output = modules["o"].rpartition(".")[0]  # BERT keeps the residual's LayerNorm there
    for name, shape in model.shapes.items():
        inside = not block or name.startswith(f"{block}.")
        if not inside or module_of(name) in own or _BUFFERS.search(name):
            continue
        if _QK_NORM.search(name):
            if len(shape) != 1:
                raise _Unknown(f"{name} of shape {shape} is not understood")
            norms.append(name)
        elif not (output != block and name.startswith(f"{output}.") and "norm" in name.lower()):
            raise _Unknown(f"{name} is not understood")
    return sorted(norms)


def _interleaved(model: Transformer, module: str) -> bool:
    """Whether a fused matrix holds q, k, v head by head; the layouts called query_key_value differ between models."""
    if not module.endswith("query_key_value"):
        return False
    if model.config.get("model_type") not in _INTERLEAVED:
        raise _Unknown(f"how {module} is laid out is not known")
    return True


def _sections(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    keys = ("text_config", "vision_config", "encoder", "decoder", "llm_config")
    return [config, *(c for key in keys if isinstance(c := config.get(key), Mapping))]


def _head_count(config: Mapping[str, Any], block: str) -> int:
    """The number of attention heads of a block, from the part of the config it belongs to; 0 where it is not said."""
    for part in ("vision", "text"):
        section = config.get(f"{part}_config")
        if isinstance(section, Mapping) and part in block:
            return _first_number(section)
    if block.startswith("decoder") or ".decoder." in block:
        count = config.get("decoder_attention_heads")
        if isinstance(count, int):
            return count
    nested = config.get("text_config")
    return _first_number(config) or (_first_number(nested) if isinstance(nested, Mapping) else 0)


def _first_number(section: Mapping[str, Any]) -> int:
    return next((int(section[k]) for k in _HEADS if isinstance(section.get(k), int)), 0)
