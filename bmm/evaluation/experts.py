"""Mixture-of-Experts layers with one Linear a matrix, in place of transformers' stacked ones.

transformers 5 holds all experts of a layer in two tensors of three dimensions, and stores them on disk one matrix a
name. Here the layer is computed from the matrices as stored: each has its own hook, Gram and regression.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import RecipeError

GATE_UP, DOWN = "gate_up_proj", "down_proj"


class Expert(nn.Module):
    """One expert: three matrices without bias."""

    def __init__(self, hidden: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()

        def linear(inputs: int, outputs: int) -> nn.Module:
            return torch.nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False, dtype=dtype)

        self.gate_proj, self.up_proj = linear(hidden, width), linear(hidden, width)
        self.down_proj = linear(width, hidden)


class SeparateExperts(nn.ModuleList):
    """The experts of one layer, called as transformers' stacked ones are.

    ``token_mask`` (tokens,), where it is set, leaves tokens out: nothing may read what comes out for them. Grams are
    collected so, without padding.
    """

    def __init__(self, stacked: nn.Module) -> None:
        gate_up = stacked.get_parameter(GATE_UP)  # (experts, 2 width, hidden)
        count, twice, hidden = gate_up.shape
        super().__init__(Expert(hidden, twice // 2, gate_up.dtype) for _ in range(count))
        act = stacked.act_fn
        assert isinstance(act, nn.Module)
        self.act_fn = act  # a child too, though no expert
        self.num_experts = count
        self._gate: Callable[[Tensor], Tensor] | None = getattr(stacked, "_apply_gate", None)
        stacked._parameters.clear()  # the gate may be a method of it
        self.token_mask: Tensor | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum over each token's experts: (n, hidden), (n, k), (n, k) -> (n, hidden)."""
        out = torch.zeros_like(hidden_states)
        kept = None if self.token_mask is None else self.token_mask.reshape(-1, 1).to(top_k_index.device)
        for number in range(self.num_experts):
            expert = self[number]
            assert isinstance(expert, Expert)
            chosen = top_k_index == number  # (n, k)
            if kept is not None:
                chosen = chosen & kept
            token, place = torch.where(chosen)
            if len(token) == 0:
                continue
            x = hidden_states[token]  # (m, hidden)
            gate, up = expert.gate_proj(x), expert.up_proj(x)  # (m, width)
            h = self.act_fn(gate) * up if self._gate is None else self._gate(torch.cat([gate, up], -1))
            y = expert.down_proj(h) * top_k_weights[token, place, None]
            out = out.index_add(0, token, y.to(out.dtype))
        return out


def stacked_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of stacked experts that `SeparateExperts` can stand for, by their path in the model."""
    return {name: module for name, module in model.named_modules() if _is_plain(module)}


def separate(model: nn.Module, path: str) -> None:
    """Put `SeparateExperts` in place of the stacked ones at ``path``. Raises `RecipeError` where these have hooks."""
    parent, _, last = path.rpartition(".")
    stacked = model.get_submodule(path)
    if stacked._forward_hooks or stacked._forward_pre_hooks:
        raise RecipeError(f"{path} has hooks of its own", "build the model without them")
    setattr(model.get_submodule(parent), last, SeparateExperts(stacked))


def _is_plain(module: nn.Module) -> bool:
    """Two stacks (experts, out, in) with the gate's rows before the up projection's, and nothing else."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    if own.keys() != {GATE_UP, DOWN} or any(p.dim() != 3 for p in own.values()) or not hasattr(module, "act_fn"):
        return False
    unusual = ("is_transposed", "has_bias", "has_post_expert_norm")
    if any(getattr(module, flag, False) for flag in unusual):
        return False
    if not getattr(module, "has_gate", True) or not getattr(module, "is_concatenated", True):
        return False
    (count, twice, hidden), down = own[GATE_UP].shape, own[DOWN].shape
    return tuple(down) == (count, hidden, twice // 2)
