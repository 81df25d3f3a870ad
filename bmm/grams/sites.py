"""Which weights of a model have a Gram, and how a module's input becomes the rows its weight is multiplied with."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import GramError, did_you_mean
from .task_grams import Layout

Tap = Literal["input", "self", "query", "key", "value", "context"]
"""What of a module's call a weight multiplies: its input; in attention the common input of q, k and v, one of the
three, or what attention hands to the output projection."""

PATCH_ELEMENTS = 1 << 22
"""Unfolded elements at a time: a 3x3 patch matrix is nine times its image."""


class Patch(NamedTuple):
    """How a convolution cuts its input into patches."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]  # left, right, top, bottom
    mode: str

    @classmethod
    def of(cls, module: nn.Conv2d) -> Patch:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        # torch's own resolution of padding="same" and "valid", in the order F.pad takes
        padding = tuple(module._reversed_padding_repeated_twice)
        return cls(module.kernel_size, module.stride, module.dilation, padding, mode)

    def rows(self, images: Tensor) -> Iterator[Tensor]:
        """The patches of images (b, c, h, w) or (c, h, w), as chunks (n, places, c * kh * kw)."""
        images = images.detach()
        images = images.unsqueeze(0) if images.dim() == 3 else images
        if images.dtype not in (torch.float32, torch.float64):
            images = images.float()
        each = images[0].numel() * self.kernel[0] * self.kernel[1] if len(images) else 1
        for chunk in images.split(max(1, PATCH_ELEMENTS // max(each, 1))):
            padded = F.pad(chunk, self.padding, mode=self.mode)
            yield F.unfold(padded, self.kernel, dilation=self.dilation, stride=self.stride).mT


@dataclass(eq=False)
class Site:
    """One weight parameter with a Gram. ``names`` are its parameter names (several where modules are tied),
    ``biases`` those of the bias that joins it (none where it has none), ``taps`` the modules that use it."""

    names: tuple[str, ...]
    biases: tuple[str, ...]
    layout: Layout
    dim: int
    patch: Patch | None
    taps: tuple[tuple[nn.Module, Tap], ...]

    @property
    def homogeneous(self) -> bool:
        return bool(self.biases)


class _Use(NamedTuple):
    """One module's use of a weight."""

    module: nn.Module
    tap: Tap
    layout: Layout
    dim: int
    patch: Patch | None
    bias: Tensor | None


def find_sites(model: nn.Module, names: Collection[str] | None, bias: bool) -> tuple[list[Site], dict[str, str]]:
    """The weights of ``model`` that can have a Gram, in model order, and why the others (2-d and up) cannot.

    ``names`` restricts both to these parameter names; ``bias`` lets a bias join its weight. Raises `GramError` for
    a name the model does not have.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    if names is not None:
        known = {name for group in aliases.values() for name in group} | set(model.state_dict())
        for name in names:
            if name not in known:
                raise GramError(f"the model has no parameter {name}", did_you_mean(name, known))
        aliases = {key: [n for n in group if n in names] for key, group in aliases.items()}
    projections = {id(m.out_proj): m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    uses: dict[int, list[_Use | str]] = {}
    owners: dict[int, int] = {}
    for module in model.modules():
        for attribute, own in module._parameters.items():
            if own is not None:
                owners[id(own)] = owners.get(id(own), 0) + 1
                uses.setdefault(id(own), []).append(_use(module, attribute, own, projections))
    sites: list[Site] = []
    skipped: dict[str, str] = {}
    for parameter in model.parameters():
        mine = aliases[id(parameter)]
        if parameter.dim() < 2 or not mine:
            continue
        found = _agree(uses[id(parameter)])
        if isinstance(found, str):
            skipped |= dict.fromkeys(mine, found)
            continue
        joined: list[str] = []
        first = found[0]
        # a bias that other weights use as well cannot be solved with this one
        if bias and first.bias is not None and owners[id(first.bias)] == len(found):
            joined = aliases[id(first.bias)]
        taps = tuple((use.module, use.tap) for use in found)
        biases = tuple(joined) if len(joined) == len(mine) else ()
        sites.append(Site(tuple(mine), biases, first.layout, first.dim, first.patch, taps))
    return sites, skipped


def _agree(uses: list[_Use | str]) -> list[_Use] | str:
    """All uses of a weight, or why they have no Gram in common."""
    reasons = [use for use in uses if isinstance(use, str)]
    if reasons:
        return reasons[0] if len(uses) == 1 else f"tied: {reasons[0]}"
    found = [use for use in uses if not isinstance(use, str)]
    if any((u.layout, u.patch, id(u.bias)) != (found[0].layout, found[0].patch, id(found[0].bias)) for u in found):
        return "tied to a module of another kind or with another bias"
    return found


def _use(
    module: nn.Module, attribute: str, weight: Tensor, projections: dict[int, nn.MultiheadAttention]
) -> _Use | str:
    """How a module uses one of its parameters, or why that has no Gram."""
    kind = type(module).__name__
    attention = projections.get(id(module), module)
    if isinstance(attention, nn.MultiheadAttention) and type(attention).forward is not nn.MultiheadAttention.forward:
        return f"{type(attention).__name__} is attention of its own kind"
    if isinstance(module, nn.MultiheadAttention) and attribute == "in_proj_weight":
        return _Use(module, "self", "linear", weight.shape[1], None, module.in_proj_bias)
    if isinstance(module, nn.MultiheadAttention) and attribute in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        taps: dict[str, Tap] = {"q": "query", "k": "key", "v": "value"}
        # the three share one bias vector, which no single weight can take along
        return _Use(module, taps[attribute[0]], "linear", weight.shape[1], None, None)
    if attribute != "weight":
        return f"{attribute} of {kind} multiplies no module input"
    if id(module) in projections:
        return _Use(projections[id(module)], "context", "linear", weight.shape[1], None, module._parameters["bias"])
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return _Use(module, "input", "linear", weight.shape[1], None, module.bias)
    if kind == "Conv1D" and hasattr(module, "nf"):  # transformers' transposed Linear, known by its shape: no import
        return _Use(module, "input", "conv1d", weight.shape[0], None, module._parameters.get("bias"))
    if kind.lower().endswith("topkrouter") and weight.dim() == 2:  # transformers' router: linear(tokens, weight, bias)
        return _Use(module, "input", "linear", weight.shape[1], None, module._parameters.get("bias"))
    if isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward:
        if module.groups != 1:
            return f"convolution in {module.groups} groups"
        return _Use(module, "input", "conv2d", weight[0].numel(), Patch.of(module), module.bias)
    return f"{kind} is no Linear, Conv1D, Conv2d or attention projection"
