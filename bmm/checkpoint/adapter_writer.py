"""A merged model as a PEFT adapter: its change of the base, factorised to a rank, and how much of it that keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import WriteError
from ..linalg import all_finite, truncated
from .adapter_config import CONFIG
from .adapter_names import PREFIX, tied_names
from .adapters import WEIGHTS
from .atomic import atomic_folder, destination, sync, writing
from .formats import some
from .reader import Checkpoint
from .tied import role_of

REPORT = "truncation.json"
LOW_RANK = ("linear", "conv1d", "embedding", "conv")
FULL_MODEL = "write a full model, or leave these out with skip"


@dataclass(frozen=True)
class Site:
    """A parameter as the model computes with it: its module's and its own name there, and the module's kind.

    ``kind``: linear, conv1d (transformers', stored (in, out)), embedding, conv, "whole" (a module that is saved in
    full, such as a norm), or "" for a parameter that no part of an adapter can hold.
    """

    module: str
    leaf: str
    kind: str


@dataclass(frozen=True)
class Truncation:
    """What became of a merge in an adapter. Errors are relative: |D - B A| / |D| with D = W - W0 (Frobenius norms).

    ``modules``: by the base's weight name, "rank" kept and "error". ``full``: names stored in full. ``error``: over all
    factorised weights together.
    """

    rank: int
    error: float
    modules: dict[str, dict[str, float]]
    full: tuple[str, ...]

    @property
    def energy(self) -> float:
        """The share of |D|^2 that is kept."""
        return 1 - self.error**2

    def to_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "error": self.error,
            "energy": self.energy,
            "modules": self.modules,
            "full": list(self.full),
        }


def write_adapter(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    base: Checkpoint,
    sites: Mapping[str, Site],
    rank: int,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    extra_files: Mapping[str, str] | None = None,
) -> Truncation:
    """Write a merge as adapter_config.json and adapter_model.safetensors, which peft loads on the same base.

    Weights of linear layers, embeddings and convolutions become B A of the leading ``rank`` singular triples of their
    difference to the base. Biases, and norms, are stored in full, and so is a weight that is input
    embedding and output layer in one: factors would part them.

    Args:
        tensors: names and merged tensors, one after the other; one is held at a time besides the adapter.
        sites: where each of the base's parameters stands in the model, by the base's names.
        dtype: of the factors.
        extra_files: texts by file name; "{truncation}" in them gives way to the errors.

    Raises `WriteError`, leaving nothing behind, where the folder is taken, a value is not finite, or a parameter
    changes that an adapter cannot hold; these are named.
    """
    target = destination(folder, overwrite, (base.path,))
    collected = _Collected(base, sites, rank, dtype, set(tied_names(base)))
    for name, tensor in tensors:
        collected.add(name, tensor)
    found, found_tensors, config = collected.finish()
    with atomic_folder(target, overwrite) as temporary, writing(target):
        path = temporary / WEIGHTS[0]
        path.touch()  # the library's own file would be the owner's alone
        mode = path.stat().st_mode
        save_file(found_tensors, path, metadata={"format": "pt"})
        path.chmod(mode & 0o777)
        sync(path)
        texts = {CONFIG: json.dumps(config, indent=2) + "\n", REPORT: json.dumps(found.to_json(), indent=1) + "\n"}
        for file_name, text in (texts | dict(extra_files or {})).items():
            (temporary / file_name).write_text(text.replace("{truncation}", truncation_text(found)))
            sync(temporary / file_name)
    return found


def read_truncation(folder: str | Path) -> dict[str, Any] | None:
    """What `write_adapter` reported of the adapter in ``folder``; None where there is none."""
    path = Path(folder) / REPORT
    return dict(json.loads(path.read_text())) if path.is_file() else None


def truncation_text(found: Truncation) -> str:
    """The errors in words, the worst modules first."""
    worst = sorted(found.modules.items(), key=lambda item: -item[1]["error"])
    lines = [f"| {name} | {entry['rank']:g} | {entry['error']:.3g} |" for name, entry in worst]
    full = f"{len(found.full)} tensors are stored in full ({some(found.full)})." if found.full else ""
    return "\n".join([
        f"A LoRA adapter of rank {found.rank} on the base: it keeps {100 * found.energy:.4g} % of the squared change "
        f"of {len(found.modules)} weights (relative error {found.error:.3g}). {full}".rstrip(),
        "",
        "| weight | rank | relative error |", "|---|---|---|", *lines,
    ])  # fmt: skip


class _Collected:
    """The adapter as it grows, one merged tensor after the other."""

    def __init__(
        self, base: Checkpoint, sites: Mapping[str, Site], rank: int, dtype: torch.dtype, tied: set[str]
    ) -> None:
        self.base, self.sites, self.rank, self.dtype, self.tied = base, sites, rank, dtype, tied
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}  # weight -> left (n, k), right (k, m), as stored
        self.full: dict[str, Tensor] = {}
        self.modules: dict[str, dict[str, float]] = {}
        self._lost, self._size = 0.0, 0.0

    def add(self, name: str, tensor: Tensor) -> None:
        if not self.base.info(name).floating:
            return
        w0, merged = self.base[name], tensor.detach().cpu()
        if not all_finite(merged):
            raise WriteError(f"tensor {name!r} holds NaN or Inf", "the merge failed: check its knobs and inputs")
        wide = torch.float64 if torch.float64 in (w0.dtype, merged.dtype) else torch.float32
        change = merged.to(wide).sub_(w0.to(wide)) if merged.dtype != wide else merged - w0.to(wide)
        if not change.count_nonzero():
            return
        kind = self.sites[name].kind
        if name in self.tied:  # peft ties the output layer to the input embedding, not the other way round
            for member in (n for n in self.tied if role_of(n) == "input"):
                self.full[member] = merged.to(w0.dtype).contiguous().clone()
        elif kind in LOW_RANK and name.endswith(".weight") and change.dim() > 1:
            self._factorise(name, change.flatten(1))
        elif kind or self.sites[name].leaf == "bias":
            self.full[name] = merged.to(w0.dtype).contiguous().clone()
        else:
            raise WriteError(f"{name} changes, and no adapter can hold it", FULL_MODEL)

    def finish(self) -> tuple[Truncation, dict[str, Tensor], dict[str, Any]]:
        """The report, the tensors by peft's names, and the configuration."""
        if not self.factors and not self.full:
            raise WriteError("the merge changes nothing in the base", "an adapter would be empty")
        rank = max((left.shape[1] for left, _ in self.factors.values()), default=1)
        tensors: dict[str, Tensor] = {}
        for name in list(self.factors):
            tensors |= self._pair(name, *self.factors.pop(name), rank)
        lora = {self.sites[name].module for name in self.modules}
        bias, biases = self._biases(lora)
        for name in biases:
            site = self.sites[name]
            key = f"{PREFIX}{site.module}{'.base_layer' if site.module in lora else ''}.bias"
            tensors[key] = self.full[name] if name in self.full else self.base[name]
        whole = sorted({self.sites[n].module for n in self.full if n not in biases})
        for name in self.base.names:
            if self.sites[name].module in whole:
                key = f"{PREFIX}{self.sites[name].module}.{self.sites[name].leaf}"
                tensors[key] = self.full[name] if name in self.full else self.base[name]
        error = math.sqrt(self._lost / self._size) if self._size else 0.0
        found = Truncation(rank, error, self.modules, tuple(sorted(self.full)))
        return found, tensors, self._config(rank, sorted(lora), whole, bias)

    def _factorise(self, name: str, change: Tensor) -> None:
        """Keep the leading triples of a weight's change (n, m), and what that loses."""
        size = float(torch.linalg.vector_norm(change))
        left, values, right = truncated(change, self.rank, name)  # (n, k), (k,), (m, k)
        roots = values.sqrt()
        pair = ((left * roots).to(self.dtype), (right * roots).mT.to(self.dtype))
        lost = float(torch.linalg.vector_norm(change.sub_(pair[0].to(change) @ pair[1].to(change))))
        self.factors[name] = pair
        self.modules[name] = {"rank": len(values), "error": lost / size}
        self._lost, self._size = self._lost + lost**2, self._size + size**2

    def _pair(self, name: str, left: Tensor, right: Tensor, rank: int) -> dict[str, Tensor]:
        """The two factors as peft stores them, filled up with zeros to the common rank."""
        site, shape = self.sites[name], self.base.info(name).shape
        pad = rank - left.shape[1]
        left = torch.nn.functional.pad(left, (0, pad))  # (n, r)
        right = torch.nn.functional.pad(right, (0, 0, 0, pad))  # (r, m)
        key = f"{PREFIX}{site.module}."
        if site.kind == "embedding":
            return {f"{key}lora_embedding_A": left.mT.contiguous(), f"{key}lora_embedding_B": right.mT.contiguous()}
        a, b = (left.mT, right.mT) if site.kind == "conv1d" else (right, left)
        if site.kind == "conv":
            a, b = a.reshape(rank, *shape[1:]), b.reshape(shape[0], rank, *(1 for _ in shape[2:]))
        return {f"{key}lora_A.weight": a.contiguous(), f"{key}lora_B.weight": b.contiguous()}

    def _biases(self, lora: set[str]) -> tuple[str, set[str]]:
        """peft's ``bias`` and the biases that come with it: none, those of the adapted layers, or all there are."""
        every = {n for n in self.base.names if self.sites[n].leaf == "bias"}
        if any(not self.sites[n].kind for n in self.full):
            return "all", every
        own = {n for n in every if self.sites[n].module in lora}
        return ("lora_only", own) if own & set(self.full) else ("none", set())

    def _config(self, rank: int, lora: Sequence[str], whole: Sequence[str], bias: str) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": str(self.base.path.expanduser().resolve()),
            "task_type": None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "target_modules": list(lora),
            "modules_to_save": list(whole) or None,
            "bias": bias,
            "fan_in_fan_out": any(site.kind == "conv1d" for n, site in self.sites.items() if n in self.modules),
            "ensure_weight_tying": bool(self.tied & set(self.full)),
        }
