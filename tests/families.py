"""The model families of transformers in miniature: real architectures, random weights, inputs with padding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

WORDS, LENGTH = 48, 6
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {"image_size": 8, "patch_size": 4}
TOKENS = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {"max_position_embeddings": 16, **TOKENS, **SMALL}
CAUSAL = {"num_key_value_heads": 1, **TEXT}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0,
      "vocab_size": WORDS, "pad_token_id": 0, "eos_token_id": 2}  # fmt: skip
SIDES = {"text_config": TEXT, "vision_config": {**IMAGE, **SMALL}}
ENCODER = {"q", "k", "v", "o", "fc1", "fc2"}
GATED = {"q", "k", "v", "o", "gate", "up", "down"}


@dataclass(frozen=True)
class Kind:
    """One architecture: class and configuration; ``inputs`` image, text, both or pairs (encoder and decoder)."""

    model: str
    config: str
    settings: dict = field(hash=False)
    inputs: str
    roles: set = field(hash=False)
    """Roles that have Grams when all of it runs."""
    tied: tuple[str, ...] = ()
    """Names that are one parameter in the model."""

    def build(self) -> nn.Module:
        config = getattr(transformers, self.config)(**self.settings)
        return getattr(transformers, self.model)(config).eval()

    def batch(self, n: int = 6) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        images = {"pixel_values": torch.randn(n, 3, 8, 8, generator=generator)}
        if self.inputs == "image":
            return images
        words = torch.randint(3, WORDS, (n, LENGTH), generator=generator)
        mask = (torch.arange(LENGTH) < torch.tensor([LENGTH, 4, 3, 5, 2, LENGTH] * n)[:n, None]).long()
        words[:, -1] = 2  # every sentence ends with the word that CLIP pools at
        words = torch.where(mask.bool(), words, 0)
        words[torch.arange(n), mask.sum(1) - 1] = 2
        text = {"input_ids": words, "attention_mask": mask}
        if self.inputs == "pairs":
            return text | {"decoder_input_ids": words.flip(0), "decoder_attention_mask": mask.flip(0)}
        return text | images if self.inputs == "both" else text


KINDS = {
    "clip": Kind("CLIPModel", "CLIPConfig", {**SIDES, "projection_dim": 8}, "both",
                 ENCODER | {"patch", "visual_projection", "text_projection"}),
    "clip_vision": Kind("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**IMAGE, **SMALL, "projection_dim": 8},
                        "image", ENCODER | {"patch", "visual_projection"}),
    "siglip_vision": Kind("SiglipVisionModel", "SiglipVisionConfig", {**IMAGE, **SMALL}, "image", ENCODER | {"patch"}),
    "vit": Kind("ViTForImageClassification", "ViTConfig", {**IMAGE, **SMALL, "num_labels": 3}, "image",
                ENCODER | {"patch", "head"}),
    "deit": Kind("DeiTForImageClassification", "DeiTConfig", {**IMAGE, **SMALL, "num_labels": 3}, "image",
                 ENCODER | {"patch", "head"}),
    "dinov2": Kind("Dinov2ForImageClassification", "Dinov2Config",
                   {**IMAGE, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2,
                    "num_labels": 3}, "image", ENCODER | {"patch", "head"}),
    "bert": Kind("BertForSequenceClassification", "BertConfig", TEXT, "text", ENCODER | {"pooler.dense", "head"}),
    "bert_mlm": Kind("BertForMaskedLM", "BertConfig", TEXT, "text", ENCODER | {"head"},
                     ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")),
    "roberta": Kind("RobertaForSequenceClassification", "RobertaConfig", TEXT, "text", ENCODER | {"head"}),
    "minilm": Kind("BertModel", "BertConfig", {**TEXT, "hidden_size": 12, "intermediate_size": 48}, "text", ENCODER),
    "t5": Kind("T5ForConditionalGeneration", "T5Config", T5, "pairs", ENCODER,
               ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")),
    "t5_gated": Kind("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}, "pairs",
                     ENCODER | {"up"}, ("shared.weight", "decoder.embed_tokens.weight")),
    "gpt2": Kind("GPT2LMHeadModel", "GPT2Config",
                 {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, **TOKENS}, "text",
                 {"qkv", "o", "fc1", "fc2"}, ("transformer.wte.weight", "lm_head.weight")),
    "llama": Kind("LlamaForCausalLM", "LlamaConfig", {**CAUSAL, "tie_word_embeddings": True}, "text", GATED,
                  ("model.embed_tokens.weight", "lm_head.weight")),
    "qwen2": Kind("Qwen2ForCausalLM", "Qwen2Config", {**CAUSAL, "tie_word_embeddings": True}, "text", GATED,
                  ("model.embed_tokens.weight", "lm_head.weight")),
    "qwen3": Kind("Qwen3ForCausalLM", "Qwen3Config", {**CAUSAL, "head_dim": 8}, "text", GATED | {"head"}),
    "mistral": Kind("MistralForCausalLM", "MistralConfig", CAUSAL, "text", GATED | {"head"}),
    "phi3": Kind("Phi3ForCausalLM", "Phi3Config", CAUSAL, "text", {"qkv", "o", "gate_up", "down", "head"}),
    "mixtral": Kind("MixtralForCausalLM", "MixtralConfig", {**CAUSAL, "num_local_experts": 4, "num_experts_per_tok": 2},
                    "text", GATED | {"router", "head"}),
    "qwen2_moe": Kind("Qwen2MoeForCausalLM", "Qwen2MoeConfig",
                      {**CAUSAL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
                       "shared_expert_intermediate_size": 12}, "text", GATED | {"router", "head"}),
}  # fmt: skip


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What the family is used for: logits, else an embedding."""
    found = model(**batch)
    for key in ("logits", "logits_per_image", "image_embeds", "pooler_output"):
        if getattr(found, key, None) is not None:
            return getattr(found, key)
    raise AssertionError(f"{type(found).__name__} has no output to compare")


def last(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The same, one row an input."""
    found = outputs(model, batch)
    return found if found.dim() == 2 else found[:, 0]


@functools.cache
def _base(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return KINDS[name].build()


def save(name: str, folder: Path, experts: tuple[str, ...] = ("a", "b")) -> dict[str, object]:
    """Base and experts (the base, every weight moved a little), as transformers writes them; the recipe's keys."""
    quiet(lambda: _base(name).save_pretrained(folder / "base"))
    for seed, expert in enumerate(experts):
        generator = torch.Generator().manual_seed(seed + 1)
        model = KINDS[name].build()
        model.load_state_dict(_base(name).state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        quiet(lambda model=model, expert=expert: model.save_pretrained(folder / expert))
    return {"base": str(folder / "base"), "experts": {e: str(folder / e) for e in experts}}


def quiet(work: Callable[[], object]) -> object:
    """Without transformers' progress bars."""
    transformers.utils.logging.disable_progress_bar()
    return work()
