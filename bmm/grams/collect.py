"""Grams from forward hooks: run an expert on its calibration inputs and watch what reaches every weight.

Memory stays bounded by the Grams themselves: activations are reduced as they pass, batch by batch, and modules that
read the very same tensor (q, k and v) are reduced once. All tokens count but padding (see `bmm.grams.padding`).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GramError
from .accumulate import GramAccumulator
from .norms import NormSite, find_norms
from .padding import Padding, masked_tokens, without_padding
from .sites import Patch, Site, Tap, find_sites
from .task_grams import TaskGrams


def collect(
    model: nn.Module,
    forward: Callable[[nn.Module, Any], Any],
    batches: Iterable[Any],
    *,
    names: Collection[str] | None = None,
    bias: bool = True,
    norms: bool = False,
    device: torch.device | str | None = None,
    progress: Callable[[int], None] | None = None,
) -> TaskGrams:
    """Grams of all that reaches the weights of ``model`` in ``forward(model, batch)``, batch after batch.

    Covers Linear, transformers' Conv1D, Conv2d without groups, and MultiheadAttention: its ``in_proj_weight`` in
    self-attention, and its ``out_proj``, which no hook sees (the attention runs a second time with an identity in
    its place). ``names`` restricts the work to these parameters; ``bias`` lets biases join their weights through a
    constant input 1; ``norms`` adds the Grams of every norm's channels (see `bmm.grams.norms`). Grams are summed on
    ``device``, by default where the inputs are, and returned on the CPU.
    ``progress`` is called with the number of batches done.

    The model runs in evaluation mode, without gradients and without the fused encoder path, and is left as it was
    found. A weight that ran several times in a forward sums over its calls. Two weights share a Gram if in every
    batch they read the same tensors, unchanged in between. A weight that never ran is listed in ``skipped``.
    Raises `GramError` for unknown names, no batches, or NaN and overflow among the activations.
    """
    sites, skipped = find_sites(model, names, bias)
    norm_sites = find_norms(model, names) if norms else []
    recorder = _Recorder(device)
    done = 0
    with _watching(model, sites, norm_sites, recorder), torch.inference_mode(False), torch.no_grad():
        for done, batch in enumerate(batches, 1):
            recorder.padding = Padding.of(batch, model)
            with masked_tokens(model, recorder.padding):
                forward(model, batch)
            recorder.end_forward()
            if progress is not None:
                progress(done)
    if done == 0:
        raise GramError("no calibration batches", "give at least one batch of inputs")
    return _with_norms(_result(sites, skipped, recorder), norm_sites)


def reading_order(
    model: nn.Module,
    forward: Callable[[nn.Module, Any], Any],
    batch: Any,
    *,
    names: Collection[str] | None = None,
    norms: bool = False,
) -> list[tuple[str, ...]]:
    """The weights that have a Gram in one forward, in the order in which they are first used.

    Weights that read the same tensor come together, one tuple of parameter names a reading; a norm is alone. Arguments
    and errors as `collect`.
    """
    sites, _ = find_sites(model, names, True)
    norm_sites = find_norms(model, names) if norms else []
    recorder = _Recorder(None)
    with _watching(model, sites, norm_sites, recorder), torch.inference_mode(False), torch.no_grad():
        forward(model, batch)
        recorder.end_forward()
    groups: dict[int, list[str]] = {}
    for site in recorder.order:
        if isinstance(site, NormSite):
            groups[id(site)] = [] if site.failed else [*site.names]
        elif site in recorder.group_of:
            groups.setdefault(id(recorder.group_of[site]), []).extend(site.names)
    return [tuple(group) for group in groups.values() if group]


@dataclass(frozen=True)
class _Seen:
    """A tensor met in this forward. The weak reference keeps no activation alive, yet no id can be taken for it."""

    reference: weakref.ref[Tensor]
    state: tuple[int, ...] | tuple[float, ...]
    serial: int


@dataclass
class _Read:
    """One reading of a tensor by a weight; equal where the same rows were read."""

    key: tuple[int, Patch | None, bool, int]  # tensor, patches, with a constant 1, mask
    gram: GramAccumulator = field(compare=False)


@dataclass(eq=False)
class _Group:
    """Weights that have read the same tensors in every batch so far."""

    members: list[Site]
    total: GramAccumulator


class _Recorder:
    """Sums Grams and finds out who shares them.

    The first forward's readings decide the groups. From then on a group's readings are added as soon as all its
    members agree on them; members that do not by the end of a forward part, each with the common sum so far.
    """

    def __init__(self, device: torch.device | str | None) -> None:
        self.device = device
        self.muted = False
        self.padding = Padding()
        self.failed: dict[Site, str] = {}
        self.order: dict[Site | NormSite, None] = {}
        self.group_of: dict[Site, _Group] = {}
        self._seen: dict[int, _Seen] = {}
        self._serial = 0
        self._fresh: dict[tuple[int, Patch | None, bool, int], GramAccumulator] = {}
        self._reads: dict[Site, list[_Read]] = {}

    def read(self, site: Site, x: Tensor) -> None:
        """A weight is about to be multiplied with ``x``."""
        if site in self.failed:
            return
        self.order.setdefault(site)
        mask = self.padding.mask_for(site.names[0]) if site.patch is None else None
        group = self.group_of.get(site)
        if group is not None and len(group.members) == 1 and site not in self._reads:
            self._update(group.total, site, x, mask)  # no one to agree with
            return
        key = (self._identify(x), site.patch, site.homogeneous, id(mask))
        if key not in self._fresh:
            gram = self._fresh[key] = GramAccumulator(site.dim, site.homogeneous, device=self.device or x.device)
            self._update(gram, site, x, mask)
        self._reads.setdefault(site, []).append(_Read(key, self._fresh[key]))
        if group is not None and all(self._reads.get(m) == self._reads[site] for m in group.members):
            for read in self._reads[site]:
                group.total.add(read.gram)
                self._fresh.pop(read.key, None)
            for member in group.members:
                del self._reads[member]

    def _update(self, gram: GramAccumulator, site: Site, x: Tensor, mask: Tensor | None) -> None:
        if mask is not None and any(getattr(m, "batch_first", True) is False for m, _ in site.taps):
            mask = mask.mT
        try:
            for rows in [without_padding(x, mask)] if site.patch is None else site.patch.rows(x):
                gram.update(rows)
        except GramError as error:
            raise GramError(f"{site.names[0]}: {error.message}", error.hint) from error

    def read_norm(self, site: NormSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A norm is about to run; it runs itself for its Gram, unheard."""
        self.order.setdefault(site)
        muted, self.muted = self.muted, True
        try:
            site.read(args, kwargs, self.padding.mask_for(site.names[0]))
        finally:
            self.muted = muted

    def fail(self, site: Site, reason: str) -> None:
        """A weight turns out to have no Gram."""
        self.failed[site] = reason
        self._reads.pop(site, None)
        if (group := self.group_of.pop(site, None)) is not None:
            group.members.remove(site)

    def end_forward(self) -> None:
        """Settle what this forward left open, and forget its tensors."""
        self._fresh.clear()
        self._seen.clear()
        newcomers = self._alike([site for site in self._reads if site not in self.group_of])
        readers = [*(sites[0] for sites in newcomers), *(site for site in self._reads if site in self.group_of)]
        holders = Counter(id(read.gram) for site in readers for read in self._reads[site])
        for sites in newcomers:
            first = self._reads[sites[0]].pop(0).gram
            self._regroup(sites, first, alone=holders[id(first)] == 1)
        for group in {id(g): g for s, g in self.group_of.items() if s in self._reads}.values():
            for sites in self._alike(group.members):
                self._regroup(sites, group.total)
        self._reads.clear()

    def _alike(self, sites: list[Site]) -> list[list[Site]]:
        """Sites by what they read and have not settled yet."""
        classes: dict[tuple[Any, ...], list[Site]] = {}
        for site in sites:
            classes.setdefault(tuple(read.key for read in self._reads.get(site, [])), []).append(site)
        return list(classes.values())

    def _regroup(self, sites: list[Site], before: GramAccumulator, alone: bool = False) -> None:
        """A group of what has read alike: the sum ``before``, which no one else needs where ``alone``, and the rest."""
        total = before if alone else before.copy()
        for read in self._reads.get(sites[0], []):
            total.add(read.gram)
        group = _Group(sites, total)
        for site in sites:
            self.group_of[site] = group
            self._reads.pop(site, None)

    def _identify(self, x: Tensor) -> int:
        """A number that two readings have in common only if they read the same tensor with the same content."""
        state = (x.data_ptr(), x._version) if not x.is_inference() else _probe(x)
        seen = self._seen.get(id(x))
        if seen is None or seen.reference() is not x or seen.state != state:
            self._serial += 1
            seen = self._seen[id(x)] = _Seen(weakref.ref(x), state, self._serial)
        return seen.serial


def _probe(x: Tensor) -> tuple[float, ...]:
    """Two projections of the content: tensors made in inference mode do not count their in-place changes."""
    flat = x.detach().flatten().double()
    wave = torch.arange(len(flat), dtype=torch.float64, device=x.device)
    return float(flat @ wave.cos()), float(flat @ wave.sin())


@contextmanager
def _watching(model: nn.Module, sites: list[Site], norms: list[NormSite], recorder: _Recorder) -> Iterator[None]:
    """Hooks in place, evaluation mode, no fused paths; everything back as it was at the end."""
    taps: dict[nn.Module, dict[Tap, Site]] = {}
    for site in sites:
        for module, tap in site.taps:
            taps.setdefault(module, {})[tap] = site
    training = [module for module in model.modules() if module.training]
    fast = torch.backends.mha.get_fastpath_enabled()
    handles = []
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it would read the weights without calling the modules
        model.eval()
        for module, wanted in taps.items():
            hook = _attention_hook if isinstance(module, nn.MultiheadAttention) else _input_hook
            handles.append(module.register_forward_pre_hook(hook(wanted, recorder), with_kwargs=True))
        for norm in norms:
            handles.append(norm.module.register_forward_pre_hook(_norm_hook(norm, recorder), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
        torch.backends.mha.set_fastpath_enabled(fast)


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


def _input_hook(wanted: dict[Tap, Site], recorder: _Recorder) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.read(wanted["input"], args[0] if args else next(iter(kwargs.values())))

    return hook


def _norm_hook(site: NormSite, recorder: _Recorder) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not recorder.muted:
            recorder.read_norm(site, args, kwargs)

    return hook


def _attention_hook(wanted: dict[Tap, Site], recorder: _Recorder) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if recorder.muted:
            return
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        query, key, value = given["query"], given["key"], given["value"]
        inputs: dict[Tap, Tensor] = {"query": query, "key": key, "value": value}
        if "self" in wanted:
            if query is key and key is value:
                recorder.read(wanted["self"], query)
            else:
                recorder.fail(wanted["self"], "cross-attention: its rows see different inputs")
        for tap, x in inputs.items():
            if tap in wanted:
                recorder.read(wanted[tap], x)
        if "context" in wanted:
            recorder.muted = True
            try:
                recorder.read(wanted["context"], _context(module, args, kwargs))
            finally:
                recorder.muted = False

    return hook


def _context(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What attention hands to its output projection: its result with an identity for that projection."""
    own = dict(attention.named_parameters())
    weight = own["out_proj.weight"]
    replaced = {"out_proj.weight": torch.eye(len(weight), dtype=weight.dtype, device=weight.device)}
    if "out_proj.bias" in own:
        replaced["out_proj.bias"] = torch.zeros_like(own["out_proj.bias"])
    context: Tensor = torch.func.functional_call(attention, replaced, args, kwargs)[0]
    return context


def _result(sites: list[Site], skipped: dict[str, str], recorder: _Recorder) -> TaskGrams:
    grams: dict[str, Tensor] = {}
    out = TaskGrams(grams=grams, skipped=dict(skipped))
    key_of_group: dict[int, str] = {}
    for site in sites:
        if (group := recorder.group_of.get(site)) is None or group.total.count == 0:
            reason = recorder.failed.get(site, "its module never ran on the calibration inputs")
            out.skipped.update(dict.fromkeys(site.names, reason))
            continue
        if id(group) not in key_of_group:
            key = key_of_group[id(group)] = site.names[0]
            try:
                grams[key] = group.total.finish().cpu()
            except GramError as error:
                raise GramError(f"{key}: {error.message}", error.hint) from error
            out.count[key], out.has_bias[key] = group.total.count, site.homogeneous
        out.key_of.update(dict.fromkeys(site.names, key_of_group[id(group)]))
        out.layout.update(dict.fromkeys(site.names, site.layout))
        out.bias_of.update(zip(site.names, site.biases, strict=False))
    return out


def _with_norms(out: TaskGrams, sites: list[NormSite]) -> TaskGrams:
    norms: dict[str, Tensor] = {}
    for site in sites:
        if site.failed or site.count == 0:
            reason = site.failed or "its module never ran on the calibration inputs"
            out.skipped.update(dict.fromkeys(site.names, reason))
            continue
        for name in site.names:
            norms[name], out.count[name] = site.gram(), site.count
        out.norm_bias.update(zip(site.names, site.biases, strict=False))
    return replace(out, norms=norms)
