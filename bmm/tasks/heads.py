"""Frozen heads: what stays a task's own while everything before it is merged.

A head is a linear map of features (``weight`` (classes, d), perhaps ``bias``), or the head modules of a checkpoint, put
in the model's place while the task runs.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import fingerprint_tensors, open_checkpoint
from ..errors import BmmError, RecipeError
from ..roles import role_of

TEMPLATES = ("a photo of a {}.",)
POOLINGS = ("auto", "first", "mean")
"""What of the tokens a linear head reads: the model's own pooled output where it has one, the first, or their mean."""


@dataclass(frozen=True, eq=False)
class Head:
    """A task's own last layer.

    ``linear``: tensors weight (classes, d) and bias (classes,) for features; or ``modules``: tensors by the model's own
    names. ``normalise``: features have length 1, ``scale`` multiplies the logits, as CLIP's zero-shot heads want it.
    """

    linear: Mapping[str, Tensor] = field(default_factory=dict)
    modules: Mapping[str, Tensor] = field(default_factory=dict)
    normalise: bool = False
    scale: float = 1.0

    @property
    def classes(self) -> int | None:
        """How many there are, where that can be told: rows of the last matrix."""
        matrices = [t for t in (self.linear or self.modules).values() if t.dim() == 2]
        return len(matrices[-1]) if matrices else None

    @property
    def cache_key(self) -> str:
        """What tells two heads apart where results are cached."""
        tensors = {**self.linear, **self.modules}
        return f"{fingerprint_tensors(tensors)} {self.normalise} {self.scale}" if tensors else ""

    def logits(self, features: Tensor) -> Tensor:
        """Of features (n, d): (n, classes)."""
        weight, bias = self.linear["weight"], self.linear.get("bias")
        if features.shape[-1] != weight.shape[1]:
            raise RecipeError(
                f"the head takes {weight.shape[1]} features, the model gives {features.shape[-1]}",
                "use a head made for this model",
            )
        x = F.normalize(features, dim=-1) if self.normalise else features
        out = F.linear(x, weight.to(x), None if bias is None else bias.to(x))
        return out * self.scale


def load_head(path: str | Path, names: Sequence[str] = ()) -> Head:
    """The head in a file or in an expert's checkpoint.

    A file with ``weight`` (and ``bias``) is a linear head. Of any other checkpoint the head's modules are taken: the
    tensors that match ``names`` (glob patterns), else those whose role is head. Raises `RecipeError` for none.
    """
    try:
        found = open_checkpoint(path)
    except BmmError as error:
        raise RecipeError(f"head: {error.message}", error.hint) from error
    if "weight" in found and set(found) <= {"weight", "bias"}:
        if len(found.info("weight").shape) != 2:
            raise RecipeError(f"head {path}: weight has shape {found.info('weight').shape}", "(classes, features)")
        return Head(linear={n: found[n].float() for n in found})
    if names:
        kept = [n for n in found if any(fnmatch.fnmatchcase(n, p) for p in names)]
    else:
        kept = [n for n in found if role_of(n) == "head"]
    if not kept:
        raise RecipeError(
            f"head {path}: no tensor {' or '.join(names) if names else 'weight, nor a module known to be a head'}",
            f"its tensors: {', '.join(list(found)[:4])} ...; say which with head_names",
        )
    return Head(modules={n: found[n].float() for n in kept})


@dataclass(frozen=True, eq=False)
class Classify:
    """A forward: keyword inputs -> logits (n, classes), through the task's own head where it has one.

    ``pooling``, one of `POOLINGS`, says what a linear head reads.
    """

    head: Head | None = None
    pooling: str = "auto"

    @property
    def cache_key(self) -> str:
        """Tells forwards of unlike heads apart."""
        key = self.head.cache_key if self.head else ""
        return key if self.pooling == "auto" else f"{key} {self.pooling}"

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        if self.head and self.head.linear:
            return self.head.logits(features(model, inputs, self.pooling))
        if self.head:
            own = {n: t.to(next(model.parameters()).device) for n, t in self.head.modules.items()}
            missing = [n for n in own if not _has(model, n)]
            if missing:
                raise RecipeError(f"the model has no module for the head's {missing[0]}", "use a head of this model")
            out: Any = torch.func.functional_call(model, own, (), dict(inputs), tie_weights=False)
        else:
            out = model(**inputs)
        logits = getattr(out, "logits", out if isinstance(out, Tensor) else None)
        if not isinstance(logits, Tensor):
            raise RecipeError(f"{type(model).__name__} gives no logits", "give the task a head")
        if self.head is None and bool(torch.isnan(logits).all()):
            raise RecipeError(
                f"the head of {type(model).__name__} is not merged (skip) and the task has none",
                "give it: head: PATH of the task's expert",
            )
        return logits


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_parameter(name)
    except AttributeError:
        return False
    return True


def features(model: nn.Module, inputs: Mapping[str, Tensor], pooling: str = "auto") -> Tensor:
    """What a linear head reads (n, d): the projected image embedding of CLIP and SigLIP, else the pooled output, else
    the first token's last hidden state; of a classifier, what its head would read.

    ``pooling``: "first" or "mean" of the last hidden states in its place; padding does not count.
    """
    if pooling != "auto":
        return _pooled(model, inputs, pooling)
    if set(inputs) == {"pixel_values"} and hasattr(model, "get_image_features"):
        images: Any = model
        found = images.get_image_features(**inputs)
        return found if isinstance(found, Tensor) else found.pooler_output
    backbone = getattr(model, str(getattr(model, "base_model_prefix", "")), None)
    out: Any = model(**inputs) if _embeds(model) or not isinstance(backbone, nn.Module) else backbone(**inputs)
    for name in ("image_embeds", "text_embeds", "pooler_output"):
        value = getattr(out, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(out, Tensor):
        return out
    if isinstance(getattr(out, "last_hidden_state", None), Tensor):
        return out.last_hidden_state[:, 0]
    raise RecipeError(f"{type(model).__name__} gives no features", "use a model class with pooled or hidden outputs")


def _pooled(model: nn.Module, inputs: Mapping[str, Tensor], pooling: str) -> Tensor:
    backbone: Any = getattr(model, str(getattr(model, "base_model_prefix", "")), model)
    hidden = getattr(backbone(**inputs), "last_hidden_state", None)  # (n, tokens, d)
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise RecipeError(f"{type(model).__name__} gives no hidden states of tokens", "leave pooling out")
    if pooling == "first":
        return hidden[:, 0]
    if "attention_mask" not in inputs:
        return hidden.mean(1)
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden)  # (n, tokens, 1)
    return (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)


def _embeds(model: nn.Module) -> bool:
    return type(model).__name__.endswith("WithProjection")


def zero_shot(folder: str | Path, classes: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Head:
    """A head made of class names by the text tower of a CLIP or SigLIP checkpoint (arXiv 2103.00020, section 3.1).

    Each class is the mean of its normalised embeddings under all ``templates`` ("{}" stands for the name), normalised
    again; logits are cosines times the model's logit scale. Raises `RecipeError` for no text tower or tokenizer.
    """
    from .text import load_tokenizer

    if not classes:
        raise RecipeError("zero_shot needs class names", "list them: classes: [...]")
    for template in templates:
        if "{}" not in template:
            raise RecipeError(f"template {template!r} has no place for the class", "write {} where its name goes")
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise RecipeError("zero_shot needs transformers", "pip install 'bmm-tuner[hf]'") from error
    tokenizer = load_tokenizer(folder)
    try:
        model = AutoModel.from_pretrained(str(folder)).eval()
    except Exception as error:
        raise RecipeError(f"zero_shot: {folder} cannot be loaded: {error}", "give a CLIP or SigLIP folder") from error
    if not hasattr(model, "get_text_features"):
        raise RecipeError(f"zero_shot: {type(model).__name__} has no text tower", "give text: a CLIP or SigLIP folder")
    length = model.config.get_text_config().max_position_embeddings
    fixed = getattr(model.config, "model_type", "").startswith("siglip")  # trained on sentences padded to full length
    rows = []
    with torch.inference_mode():
        for name in classes:
            texts = [t.format(name) for t in templates]
            batch = tokenizer(texts, padding="max_length" if fixed else True, truncation=True, max_length=length,
                              return_tensors="pt")  # fmt: skip
            given = {k: v for k, v in batch.items() if k == "input_ids" or (k == "attention_mask" and not fixed)}
            found = model.get_text_features(**given)
            embeddings = found if isinstance(found, Tensor) else found.pooler_output  # (templates, d)
            rows.append(F.normalize(F.normalize(embeddings, dim=-1).mean(0), dim=-1))
        scale = float(model.logit_scale.exp()) if hasattr(model, "logit_scale") else 100.0
        bias = getattr(model, "logit_bias", None)
    linear = {"weight": torch.stack(rows).clone()}
    if isinstance(bias, Tensor):
        linear["bias"] = (bias.detach() / scale).expand(len(rows)).clone()
    return Head(linear=linear, normalise=True, scale=scale)
