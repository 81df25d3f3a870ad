"""Small bases and PEFT adapters on them, every part of an adapter moved away from its initial value."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

VOCABULARY = 40


def config(kind: str, **changes: Any) -> Any:
    import transformers as t

    if kind == "gpt2":
        return t.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=16, bos_token_id=0,
                            eos_token_id=0, **changes)  # fmt: skip
    if kind == "llama":
        return t.LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                             num_key_value_heads=1, vocab_size=VOCABULARY, max_position_embeddings=16,
                             attention_bias=True, **changes)  # fmt: skip
    return t.BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                        vocab_size=VOCABULARY, max_position_embeddings=16, **changes)  # fmt: skip


CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "bert": "BertForMaskedLM",
    "classifier": "BertForSequenceClassification",
    "encoder": "BertModel",
}


def model(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A transformers model with weights of a seed, no zeros among them."""
    import transformers

    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        built: nn.Module = getattr(transformers, CLASSES[kind])(config(kind, **changes))
        move(built.parameters(), seed, 0.1)
    return built.to(dtype).eval()


def move(parameters: Any, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)


def save(built: nn.Module, folder: Path) -> Path:
    with quiet():
        built.save_pretrained(folder)
    return folder


def adapter(base: nn.Module, folder: Path, seed: int = 1, **options: Any) -> nn.Module:
    """Put a LoRA on ``base`` (which changes it), save it to ``folder``, and return peft's model."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        wrapped = get_peft_model(base, LoraConfig(**({"r": 3, "lora_alpha": 5} | options)))
        move((p for p in wrapped.parameters() if p.requires_grad), seed, 0.1)
        wrapped.save_pretrained(folder)
    return wrapped.eval()


def merged(wrapped: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of peft's own merge."""
    with quiet():
        return dict(wrapped.merge_and_unload().state_dict())


@contextlib.contextmanager
def quiet() -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
