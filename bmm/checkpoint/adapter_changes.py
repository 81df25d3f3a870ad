"""What an adapter makes of each of the base's tensors: every part of it in its place, or an error that names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..errors import CheckpointError
from .adapter_config import CONFIG, MERGE_WITH_PEFT, AdapterConfig, lies_in
from .adapter_names import Parts, Rule, orientation
from .formats import TensorFile, some
from .low_rank import Change, Factor, LowRank, Rows, Shifted, Stored
from .reader import Checkpoint
from .tied import role_of

TIED = "train with ensure_weight_tying, or save the base untied (tie_word_embeddings: false, lm_head.weight stored)"


class Builder:
    """What becomes of each of the base's tensors."""

    def __init__(
        self, folder: Path, base: Checkpoint, adapter: TensorFile, config: AdapterConfig, parts: Parts,
        rule: Rule, tied: tuple[str, ...],
    ) -> None:  # fmt: skip
        self.folder, self.base, self.adapter, self.config, self.parts = folder, base, adapter, config, parts
        self.to_base, self.to_peft, self.tied = rule.to_base, rule.to_peft, tied

    def changes(self) -> dict[str, Change]:
        """Changes by the base's names; those of a tied weight are one, under each of its stored names."""
        found: dict[str, Change] = {}
        for name, stored in self.parts.full.items():
            if not self._is_second_name(name):
                found[self.to_base(name)] = Stored(self.adapter, stored)
        turned = self._turned()
        for module, kinds in self.parts.lora.items():
            found |= self._lora(module, kinds, module in turned)
        for module, stored in self.parts.tokens.items():
            name = f"{self.to_base(module)}.weight"
            if isinstance(found.get(name), LowRank):
                raise self._refused(f"{module} has a LoRA and trained tokens", MERGE_WITH_PEFT)
            found[name] = Rows(self._w0(name), self._rows(module, stored, name), Stored(self.adapter, stored))
        return self._tie(found)

    def require_all_targets(self, saved: Sequence[str]) -> None:
        """A module that the configuration names must be there, and one that is there must be named: peft leaves a
        tensor that is not aside. ``saved``: the parameters that came in full."""
        config, parts = self.config, self.parts
        # peft takes the module that it ties to another one out of target_modules
        tied = [m for m in parts.lora if config.ties and self._tied_to(f"{self.to_base(m)}.weight")]
        named = [m for m in parts.lora if config.targets is None or config.is_target(m)]
        unnamed = [m for m in parts.lora if m not in {*named, *tied}]
        if unnamed:
            raise self._refused(
                f"{len(unnamed)} modules have a LoRA that {CONFIG} does not target: {some(unnamed)}",
                "save the adapter again with peft, so that both files agree",
            )
        adapted = {self.to_base(m): m for m in parts.lora}
        stored = {n.removesuffix(".weight") for n in self.base.names if n.endswith(".weight")}
        absent = [
            m for m in sorted(stored - set(adapted)) if config.targets != "all-linear" and self._due(self.to_peft(m), m)
        ]
        if absent:
            raise self._refused(f"no LoRA for {len(absent)} modules it targets: {some(absent)}", "download it again")
        full = {self.to_base(n) for n in parts.full}
        missing = [  # peft names classifier and score, whichever there is
            module
            for module in config.modules_to_save
            if not any(lies_in(module, n.rpartition(".")[0]) for n in saved)
            and any(lies_in(module, self.to_peft(n.rpartition(".")[0])) for n in self.base.names)
        ]
        if config.bias != "none":
            missing += [f"{m}.bias" for m in adapted if f"{m}.bias" in self.base and f"{m}.bias" not in full]
        if missing:
            raise self._refused(f"{CONFIG} says that {some(missing)} is saved, and it is not", "save it again")

    def _due(self, module: str, stored: str) -> bool:
        weight = self.base.info(f"{stored}.weight")
        return len(weight.shape) > 1 and weight.floating and self.config.is_target(module)

    def _is_second_name(self, name: str) -> bool:
        """Whether a bias that the base lacks is an outer module's under a second name: BERT's decoder.bias."""
        outer, full = f"{name.rpartition('.')[0].rpartition('.')[0]}.bias", self.parts.full
        if not name.endswith(".bias") or self.to_base(name) in self.base or outer not in full:
            return False
        return torch.equal(self.adapter.read(full[name]), self.adapter.read(full[outer]))

    def _w0(self, name: str) -> Stored:
        """The weight an adapted module starts from: one saved with the adapter, else the base's."""
        saved = next((s for n, s in self.parts.full.items() if self.to_base(n) == name), None)
        if saved is not None:
            return Stored(self.adapter, saved)
        name = name if name in self.base else self.tied[0] if self._tied_to(name) else name
        if name not in self.base:
            raise self._refused(f"no {name} in the base {self.base.path}", "give the base it was trained on")
        return Stored(self.base.holder(name), name)

    def _tied_to(self, name: str) -> bool:
        """Whether a name is the tied weight's, stored or not."""
        return bool(self.tied) and (name in self.tied or (role_of(name) == "output" and name not in self.base))

    def _turned(self) -> set[str]:
        shapes = {}
        for module, kinds in self.parts.lora.items():
            weight = self._w0(f"{self.to_base(module)}.weight").info.shape
            if {"A", "B"} <= kinds.keys() and len(weight) == 2:
                b, a = self.adapter.infos[kinds["B"]].shape, self.adapter.infos[kinds["A"]].shape
                if len(a) == len(b) == 2:
                    shapes[module] = (weight, b[0], a[1])
        return orientation(self.folder, shapes, self.config.fan_in_fan_out)

    def _lora(self, module: str, kinds: dict[str, str], turned: bool) -> dict[str, Change]:
        config, name = self.config, f"{self.to_base(module)}.weight"
        embedding = "embedding_A" in kinds or "embedding_B" in kinds
        a, b = (f"embedding_{k}" if embedding else k for k in "AB")
        expected = {a, b, *(["magnitude_vector"] if config.dora else []), *(["bias"] if config.lora_bias else [])}
        if embedding:
            expected.discard("bias")  # lora_bias does not concern embeddings
        if expected != set(kinds):
            odd = sorted(expected ^ set(kinds))
            what = "lacks" if expected - set(kinds) else "has, against its configuration,"
            raise self._refused(f"{module} {what} {some(f'lora_{k}' for k in odd)}", "save the adapter again")
        w0, scaling, rank = self._w0(name), config.scaling_of(module), config.rank_of(module)
        stored_a, stored_b = Stored(self.adapter, kinds[a]), Stored(self.adapter, kinds[b])
        left, right = Factor(stored_b), Factor(stored_a)
        if embedding or turned:
            left, right = Factor(stored_a, True), Factor(stored_b, True)
        self._require_shapes(module, w0, stored_a, stored_b, rank, embedding or turned)
        magnitude = Stored(self.adapter, kinds["magnitude_vector"]) if config.dora else None
        axis = 0 if embedding or turned else 1
        if magnitude is not None and magnitude.info.numel != w0.info.shape[0 if axis else 1]:
            raise self._refused(f"{magnitude.name} has {magnitude.info.numel} values for {w0.info.shape}", "")
        out: dict[str, Change] = {name: LowRank(w0, left, right, scaling, magnitude, axis)}
        if "bias" in kinds:
            bias, shift = f"{self.to_base(module)}.bias", Stored(self.adapter, kinds["bias"])
            if bias not in self.base or self.base.info(bias).shape != shift.info.shape:
                raise self._refused(f"{shift.name} has no bias of the base to add to", MERGE_WITH_PEFT)
            out[bias] = Shifted(self._w0(bias), shift, scaling)
        return out

    def _require_shapes(self, module: str, w0: Stored, a: Stored, b: Stored, rank: int, turned: bool) -> None:
        """A (r, i...) and B (o, r, 1...), o and i the weight's; a grouped convolution's are others, and are refused."""
        shape, first, second = w0.info.shape, a.info.shape, b.info.shape
        outputs, inputs = (shape[-1], shape[:1]) if turned else (shape[0], shape[1:])
        fits = first == (rank, *inputs) and second == (outputs, rank, *(1 for _ in shape[2:]))
        if not fits or not w0.info.floating or len(shape) < 2:
            raise self._refused(
                f"the LoRA of {module} is {second} x {first}, of rank {rank} for a weight {shape} it must be "
                f"{(outputs, rank)} x {(rank, *inputs)}",
                "is this its base, its configuration? grouped convolutions are not supported",
            )

    def _rows(self, module: str, stored: str, name: str) -> tuple[int, ...]:
        tokens = self.config.tokens
        if isinstance(tokens, Mapping):
            tokens = next((v for k, v in tokens.items() if module == k or module.endswith(f".{k}")), None)
        rows, count = self.adapter.infos[stored].shape[0], self._w0(name).info.shape[0]
        if tokens is None or len(tokens) != rows or any(row >= count for row in tokens):
            raise self._refused(f"{stored} holds {rows} rows that trainable_token_indices does not name", "save again")
        return tuple(tokens)

    def _tie(self, found: dict[str, Change]) -> dict[str, Change]:
        """One change for all names of the tied weight, or `CheckpointError`: input and output would part."""
        own = {name: change for name, change in found.items() if self._tied_to(name)}
        if not own:
            return found
        change = next(iter(own.values()))
        saved = {self.to_base(n) for n in self.parts.full if self.config.is_saved(n.rpartition(".")[0])}
        roles = {role_of(name) for name in own}
        for name, other in own.items():
            if not _same(change, other):
                raise self._refused(f"{some(sorted(own))} are one weight in the base, and part here at {name}", TIED)
        apart = isinstance(change, LowRank) or bool(saved & set(own))
        if apart and roles != {"input", "output"} and not self.config.ties:
            raise self._refused(f"it changes {some(own)} alone, which is tied in the base: the two would part", TIED)
        rest = {name: c for name, c in found.items() if name not in own}
        return rest | dict.fromkeys(self.tied, change)

    def _refused(self, what: str, hint: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}: {what}", hint)


def _same(a: Change, b: Change) -> bool:
    if a is b:
        return True
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        return a.same_as(b)
    if isinstance(a, Stored) and isinstance(b, Stored):
        return a.info == b.info and torch.equal(a.read(), b.read())
    return False
