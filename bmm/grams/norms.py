"""Which norms of a model have a regression, and what their scales multiply.

A norm computes ``y = gamma * x_hat + beta`` channel by channel. ``x_hat`` is not taken from a formula but from the
module itself, run with gamma = 1 and with gamma = 0: so LayerNorm, RMSNorm, GroupNorm, BatchNorm (in evaluation mode,
with its running statistics), transformers' own classes and those with ``(1 + gamma) * x_hat`` are one case. A first
probe with a ramp in gamma and beta finds the axis of the channels, and refuses modules that are not affine in them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import GramError
from .accumulate import gram_dtype
from .padding import without_padding

_CHANNELS_SECOND = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
_EPSILONS = ("eps", "variance_epsilon", "epsilon")

Axis = Literal["trailing", "second"]


@dataclass(eq=False)
class NormSite:
    """One norm with its own gamma, and the running sums of ``x_hat`` and ``x_hat^2`` of each channel.

    ``names`` are the names of gamma (several where the module is reachable by several paths), ``biases`` those of beta,
    none where there is none. ``failed`` says why the norm has no regression after all.
    """

    module: nn.Module
    names: tuple[str, ...]
    biases: tuple[str, ...]
    failed: str = ""
    count: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(0))  # (c, 2): of x_hat^2, of x_hat
    axis: Axis | None = None

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None = None) -> None:
        """The norm is about to run with these arguments; ``mask`` (n, tokens) tells tokens from padding.

        Raises `GramError` for NaN and overflow.
        """
        if self.failed:
            return
        gamma = self.module._parameters["weight"]
        assert gamma is not None
        x_hat = self._x_hat(gamma, args, kwargs)
        if x_hat is None:
            self.failed = f"{type(self.module).__name__} is not affine in its weight, channel by channel"
            return
        kept = without_padding(_channels_last(x_hat, self.axis), mask)
        rows = kept.reshape(-1, gamma.numel())  # (n, c)
        rows = rows.to(gram_dtype(gamma.numel(), rows.device))
        sums = torch.stack([rows.square().sum(0), rows.sum(0)], dim=1).cpu().double()  # (c, 2)
        with torch.inference_mode(False):
            self.sums = sums.clone() if self.count == 0 else self.sums + sums
        self.count += len(rows)

    def gram(self) -> Tensor:
        """The Gram of ``(x_hat, 1)`` of every channel, (c, 2, 2), or of ``x_hat`` alone (c, 1, 1) without a beta."""
        square, mean = (self.sums / self.count).unbind(1)  # (c,), (c,)
        if not self.biases:
            return square[:, None, None]
        rows = [torch.stack([square, mean], -1), torch.stack([mean, torch.ones_like(mean)], -1)]
        return torch.stack(rows, -2)  # (c, 2, 2)

    def _x_hat(self, gamma: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """What gamma multiplies, in the shape of the output; None where the module is not of that form."""
        values = (*args, *kwargs.values())
        wide = torch.float64 if any(v.dtype == torch.float64 for v in values if isinstance(v, Tensor)) else None

        def widen(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.detach().to(wide or torch.float32) if floating else value

        given = tuple(widen(a) for a in args), {k: widen(v) for k, v in kwargs.items()}
        buffers = {name: widen(buffer) for name, buffer in self.module.named_buffers()}
        zero, one = torch.zeros_like(widen(gamma)), torch.ones_like(widen(gamma))

        def run(weight: Tensor, bias: Tensor) -> Tensor:
            own = {"weight": weight} | ({"bias": bias} if self.biases else {}) | buffers
            result: Tensor = torch.func.functional_call(self.module, own, *given)
            return result

        with torch.no_grad(), torch.autocast(gamma.device.type, enabled=False):
            constant = run(zero, zero)
            if not isinstance(constant, Tensor):
                return None
            x_hat = run(one, zero) - constant
            if not bool(torch.isfinite(x_hat).all()):
                raise GramError(
                    f"{self.names[0]}: its inputs hold non-finite values", "look for NaN in the calibration inputs"
                )
            if self.axis is None:
                ramp = torch.linspace(0.5, 1.5, gamma.numel()).reshape(gamma.shape).to(one)
                shifted = run(zero, ramp) - constant if self.biases else None
                self.axis = self._find_axis(ramp, x_hat, run(ramp, zero) - constant, shifted)
        return x_hat if self.axis else None

    def _find_axis(self, ramp: Tensor, x_hat: Tensor, scaled: Tensor, shifted: Tensor | None) -> Axis | None:
        """Where in the output the channels lie: there the ramp must show in the scaled and the shifted output."""
        order: list[Axis] = ["trailing", "second"]
        for axis in reversed(order) if isinstance(self.module, _CHANNELS_SECOND) else order:
            if _channels_last(x_hat, axis).shape[-ramp.dim() :] != ramp.shape:
                continue
            plain, gain = (_channels_last(t, axis) for t in (x_hat, scaled))
            offset = ramp if shifted is None else _channels_last(shifted, axis)
            close = 1e-4 * float(plain.abs().max()) if plain.numel() else 0.0
            if torch.allclose(gain, plain * ramp, rtol=1e-4, atol=close) and torch.allclose(
                offset, ramp.expand_as(offset), rtol=1e-4, atol=1e-4
            ):
                return axis
        return None


def _channels_last(x: Tensor, axis: Axis | None) -> Tensor:
    """``x`` with its channels as the last sizes."""
    return x.movedim(1, -1) if axis == "second" and x.dim() > 1 else x


def find_norms(model: nn.Module, names: Collection[str] | None) -> list[NormSite]:
    """The norms of ``model``: modules with an epsilon whose only parameters are a weight and perhaps a bias.

    ``names`` restricts them to these parameter names. A parameter that several modules use has no regression; where
    only the bias is left out, so is the norm.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if names is None or name in names:
            aliases.setdefault(id(parameter), []).append(name)
    owners: dict[int, int] = {}
    for module in model.modules():
        for used in module._parameters.values():
            owners[id(used)] = owners.get(id(used), 0) + 1
    sites = []
    for module in model.modules():
        own = {k: p for k, p in module._parameters.items() if p is not None}
        if "weight" not in own or not own.keys() <= {"weight", "bias"} or any(module.children()):
            continue
        known = isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase)
        if not known and not any(isinstance(getattr(module, e, None), float) for e in _EPSILONS):
            continue
        found = {k: aliases.get(id(p), []) for k, p in own.items()}
        if any(owners[id(p)] > 1 or len(found[k]) != len(found["weight"]) or not found[k] for k, p in own.items()):
            continue
        sites.append(NormSite(module, tuple(found["weight"]), tuple(found.get("bias", ()))))
    return sites
