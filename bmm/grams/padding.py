"""Which rows of an activation are padding, so that it stays out of the Grams.

A batch says so through its ``attention_mask`` (n, tokens), and an encoder-decoder's through
``decoder_attention_mask`` too. An activation is taken to be of those tokens where its first sizes are the mask's
(n, tokens, ...), or their product (n * tokens, ...); any other keeps all its rows, as do images and the tokens of a
decoder whose mask is not given. A batch of another form has no mask: all its tokens count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_IMAGES = re.compile(r"(^|\.)(visual|vision\w*|image\w*)(\.|$)")
_DECODER = re.compile(r"(^|\.)decoder\.")
_ACROSS = re.compile(
    r"(encdecattention|encoder_attn|crossattention|cross_attn)\.(k|v|k_proj|v_proj|self\.key|self\.value)\b"
)


@dataclass(frozen=True)
class Padding:
    """The masks of one batch, (n, tokens) and True where there is a token; None where nothing is padded."""

    tokens: Tensor | None = None
    decoder: Tensor | None = None
    has_decoder: bool = False

    @classmethod
    def of(cls, batch: Any, model: nn.Module) -> Padding:
        """The masks a batch of keyword inputs comes with."""
        if not isinstance(batch, Mapping):
            return cls()
        halves = getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True
        return cls(_mask(batch.get("attention_mask")), _mask(batch.get("decoder_attention_mask")), halves)

    def mask_for(self, parameter: str) -> Tensor | None:
        """The mask of what a weight reads, by the weight's name."""
        name = parameter.lower()
        if _IMAGES.search(name):
            return None
        own = self.has_decoder and (_DECODER.search(name) or name.startswith("lm_head")) and not _ACROSS.search(name)
        return self.decoder if own else self.tokens


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of ``x`` that are tokens, (rows, ...); all of ``x`` where the mask is not of its shape."""
    if mask is None or x.dim() < 2:
        return x
    if x.dim() > 2 and x.shape[:2] == mask.shape:
        return x[mask.to(x.device)]
    if x.dim() == 2 and len(x) == mask.numel() and mask.shape[1] > 1:
        return x[mask.reshape(-1).to(x.device)]
    return x


@contextmanager
def masked_tokens(model: nn.Module, padding: Padding) -> Iterator[None]:
    """Modules that hand each token to other modules (they have a ``token_mask``) leave padding out meanwhile."""
    routers = {} if padding.tokens is None else {n: m for n, m in model.named_modules() if hasattr(m, "token_mask")}
    try:
        for name, module in routers.items():
            module.token_mask = padding.mask_for(f"{name}.")
        yield
    finally:
        for module in routers.values():
            module.token_mask = None


def _mask(given: Any) -> Tensor | None:
    if not isinstance(given, Tensor) or given.dim() < 2:
        return None
    mask = (given != 0).reshape(-1, given.shape[-1])  # (n, options, tokens) reaches the model as (n * options, tokens)
    return None if bool(mask.all()) else mask
