"""The diagonal empirical Fisher: the mean over examples of squared per-example gradients of log p(y | x; theta).

Whole batches go through ``torch.func`` (vmap over grad). A module that vmap cannot enter - data-dependent control flow,
in-place writes to unbatched tensors, custom autograd functions without batching rule - is differentiated example by
example instead, as is a model so large that gradients of two examples exceed the memory allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import BmmError, GramError
from ..linalg import require_finite

MEMORY = 128 * 2**20
"""Bytes that the per-example gradients of one chunk may take, by default."""


@dataclass(frozen=True)
class Source:
    """Where examples come from: one task.

    ``forward(model, inputs)`` gives outputs, ``log_likelihood(outputs, targets)`` (n,) one number an example.
    ``batches`` holds (inputs, targets); where targets are None, ``sample(outputs, generator)`` draws them from the
    model itself. ``name`` is for messages.
    """

    name: str
    forward: Callable[[nn.Module, Any], Tensor]
    batches: Iterable[tuple[Any, Any]]
    log_likelihood: Callable[[Tensor, Any], Tensor]
    sample: Callable[[Tensor, torch.Generator], Any]
    generator: torch.Generator


def collect(
    model: nn.Module,
    sources: Iterable[Source],
    *,
    names: Collection[str] | None = None,
    memory: int = MEMORY,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """The diagonal Fisher of ``model`` over all examples of ``sources``: parameter name -> tensor in its shape.

    ``names`` restricts it to these parameters; tied ones share one Fisher. Gradients of at most ``memory`` bytes are
    held at a time, besides one model of sums; sums are float32 at least, results on the CPU. Labels are drawn in the
    order of the examples and do not depend on ``memory``. ``progress`` is called with the number of examples done.

    The model runs in evaluation mode and is left as it was found. Raises `GramError` for unknown names, no examples,
    or a task whose forward or log-likelihood fails; `MergeError` for gradients that are not finite.
    """
    parameters, aliases = _parameters(model, names)
    totals = {n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in parameters.items()}
    done = 0
    with _evaluating(model), torch.inference_mode(False), torch.enable_grad():
        for source in sources:
            worker = _Worker(model, parameters, source, memory)
            for inputs, targets in source.batches:
                for size, gradients in worker.gradients(inputs, targets):
                    for name, gradient in gradients.items():  # (n, *shape)
                        totals[name] += gradient.to(totals[name].dtype).square().sum(0)
                    done += size
                    if progress is not None:
                        progress(done)
    if done == 0:
        raise GramError("no calibration inputs", "give at least one")
    found = {}
    for name, owner in aliases.items():
        found[name] = (totals[owner] / done).cpu()
        require_finite(f"{name}: its Fisher", found[name])
    return found


def _parameters(model: nn.Module, names: Collection[str] | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Detached parameters by name, each once, and for every wanted name the one its parameter goes by."""
    known = dict(model.named_parameters(remove_duplicate=False))
    if names is not None and (unknown := sorted(set(names) - set(known) - set(dict(model.named_buffers())))):
        raise GramError(f"the model has no parameter {unknown[0]}", "name its own parameters")
    wanted = {n: p for n, p in known.items() if p.is_floating_point() and (names is None or n in names)}
    owner: dict[int, str] = {}
    aliases = {name: owner.setdefault(id(parameter), name) for name, parameter in wanted.items()}
    return {n: wanted[n].detach() for n in dict.fromkeys(aliases.values())}, aliases


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and attention in plain products: the fused kinds have no gradient or no batching rule.
    Everything is back as it was at the end."""
    training = [module for module in model.modules() if module.training]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module in training:
            module.training = True
        torch.backends.mha.set_fastpath_enabled(fast)


class _Applied(nn.Module):
    """A task's forward as a module, so that `functional_call` reaches the parameters of the model inside."""

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.apply_to = forward

    def forward(self, inputs: Any) -> Tensor:
        return self.apply_to(self.model, inputs)


class _Worker:
    """Per-example gradients of one source, chunk by chunk."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor], source: Source, memory: int) -> None:
        self.source = source
        self.applied = _Applied(model, source.forward)
        self.applied.training = False
        self.parameters = parameters
        bytes_each = sum(p.numel() * max(p.element_size(), 4) for p in parameters.values())
        self.chunk = max(1, memory // max(bytes_each, 1))
        self.batched = self.chunk > 1

    def gradients(self, inputs: Any, targets: Any) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(n, gradients (n, *shape) by name) of every chunk of a batch."""
        if targets is None:
            with self._blaming(), torch.no_grad():
                targets = self.source.sample(self.source.forward(self.applied.model, inputs), self.source.generator)
        count = length(inputs)
        if length(targets) != count:
            raise GramError(
                f"task {self.source.name!r}: {length(targets)} targets for {count} calibration inputs",
                "give one target an input",
            )
        start = 0
        while start < count:
            stop = min(count, start + (self.chunk if self.batched else 1))
            part = take(inputs, start, stop), take(targets, start, stop)
            if self.batched:
                try:
                    found = self._together(*part)
                except torch.OutOfMemoryError:
                    raise
                except Exception:  # what vmap cannot enter fails in many ways; a fault of the task fails again alone
                    self.batched = False
                    continue
            else:
                with self._blaming():
                    found = self._alone(*part)
            yield stop - start, found
            start = stop

    def _likelihood(self, parameters: dict[str, Tensor], inputs: Any, targets: Any) -> Tensor:
        named = {f"model.{name}": parameter for name, parameter in parameters.items()}
        outputs = functional_call(self.applied, named, (inputs,))
        found = self.source.log_likelihood(outputs, targets)
        if found.shape != (1,):
            raise ValueError(f"log_likelihood returned shape {tuple(found.shape)} for one example, not (1,)")
        return found[0]

    def _together(self, inputs: Any, targets: Any) -> dict[str, Tensor]:
        def one(parameters: dict[str, Tensor], x: Any, y: Any) -> Tensor:
            return self._likelihood(parameters, _lift(x), _lift(y))

        found: dict[str, Tensor] = vmap(grad(one), in_dims=(None, 0, 0))(self.parameters, inputs, targets)
        return {name: gradient.detach() for name, gradient in found.items()}

    def _alone(self, inputs: Any, targets: Any) -> dict[str, Tensor]:
        live = {name: parameter.detach().requires_grad_() for name, parameter in self.parameters.items()}
        value = self._likelihood(live, inputs, targets)
        gradients = torch.autograd.grad(value, list(live.values()), allow_unused=True)
        return {
            name: (torch.zeros_like(live[name]) if gradient is None else gradient)[None]
            for name, gradient in zip(live, gradients, strict=True)
        }

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        try:
            yield
        except (BmmError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise GramError(
                f"task {self.source.name!r}: no gradient of its log-likelihood: {type(error).__name__}: {error}",
                "check the task's forward, log_likelihood and sample on one batch of calibration inputs",
            ) from error


def take(batch: Any, start: int, stop: int) -> Any:
    """Examples ``start`` to ``stop`` of a batch, whatever its structure of tensors."""
    if isinstance(batch, Tensor):
        return batch[start:stop]
    if isinstance(batch, Mapping):
        return {key: take(value, start, stop) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(take(value, start, stop) for value in batch)
    return batch


def _lift(example: Any) -> Any:
    """A batch of one from an example whose first axis vmap took."""
    if isinstance(example, Mapping):
        return {key: _lift(value) for key, value in example.items()}
    if isinstance(example, tuple | list):
        return type(example)(_lift(value) for value in example)
    return example[None]


def length(batch: Any) -> int:
    """Examples in a batch, whatever its structure."""
    while isinstance(batch, Mapping | tuple | list):
        batch = next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    return len(batch)
