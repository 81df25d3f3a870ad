"""Valid documents of every kind that bmm reads, from which the mutations start."""

from __future__ import annotations

from typing import Any


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    """A tensor in the header of a safetensors file."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": entry([2, 3], 0, 24),
    "a.bias": entry([4], 24, 32, "F16"),
    "steps": entry([], 32, 40, "I64"),
}
CONFIG = {"architectures": ["ViTForImageClassification"], "model_type": "vit", "hidden_size": 16, "image_size": 16,
          "patch_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 3,
          "id2label": {"0": "a", "1": "b", "2": "c"}, "torch_dtype": "float32", "tie_word_embeddings": True,
          "hidden_act": "gelu", "text_config": {"tie_word_embeddings": True}}  # fmt: skip
RECIPE = {"base": "base", "experts": {"a": "a", "b": "b"}, "model": "m.py:f", "tasks": "t.py:f", "skip": ["head.*"],
          "anchor": "ties", "knobs": {"density": 0.3}, "grams": "hybrid", "gamma": 0.4, "calibration": 8,
          "weights": {"a": 0.5}, "groups": "depth", "group": {"x.*": "g"}, "log10_lam": [-3, 2], "rho": [0, 2],
          "search": ["gamma"], "goal": "worst", "floor": {"a": 0.9}, "objectives": ["a,b"], "budget": 9,
          "seed": 1, "dtype": "same", "shard_gib": 1.5, "early_stopping": 0.0}  # fmt: skip
MERGEKIT = {"merge_method": "ties", "base_model": "base", "dtype": "bfloat16", "parameters": {"normalize": True},
            "slices": [{"sources": [
                {"model": "a", "layer_range": [0, 2], "parameters": {"weight": [0, 0.5], "density": 0.5}},
                {"model": "b", "layer_range": [0, 2], "parameters": {"weight": [{"filter": "mlp", "value": [0, 1]},
                                                                               {"value": 1}]}},
            ]}], "tokenizer": {"source": "base"}}  # fmt: skip
BASE = {"layers.0.q.weight": (6, 4), "layers.0.q.bias": (6,), "layers.1.v.weight": (4, 4), "layers.1.v.bias": (4,),
        "embed_tokens.weight": (8, 4), "score.weight": (3, 4)}  # fmt: skip
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q", "v"],
           "rank_pattern": {"layers.1.v": 1}, "alpha_pattern": {"v": 3.5}, "modules_to_save": ["score"],
           "layers_to_transform": [0, 1], "layers_pattern": ["layers"], "use_rslora": True, "use_dora": False,
           "exclude_modules": "x.*", "trainable_token_indices": {"embed_tokens": [1, 5]}, "init_lora_weights": True,
           "fan_in_fan_out": False, "base_model_name_or_path": "/models/base", "task_type": "SEQ_CLS"}  # fmt: skip
FACTORS = {"layers.0.q.lora_A.weight": (2, 4), "layers.0.q.lora_B.weight": (6, 2), "layers.1.v.lora_A.weight": (1, 4),
           "layers.1.v.lora_B.weight": (4, 1), "score.weight": (3, 4),
           "embed_tokens.token_adapter.trainable_tokens_delta": (2, 4)}  # fmt: skip
TOKENIZERS: dict[str, Any] = {
    "tokenizer.json": {"version": "1.0", "added_tokens": [{"id": 3, "content": "<new>", "special": True}],
                       "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}},
    "vocab.json": {"a": 0, "b": 1, "ab": 2},
    "added_tokens.json": {"<new>": 3},
    "tokenizer_config.json": {"added_tokens_decoder": {"3": {"content": "<new>", "special": True}}},
}  # fmt: skip
UNIGRAM = {"added_tokens": None, "model": {"type": "Unigram", "vocab": [["<s>", 0], ["a", -1.5], ["b", -2]]}}
TASKS = """import torch
import bmm
def tasks():
    x = torch.zeros(4, 3)
    y = torch.zeros(4, dtype=torch.long)
    made = [bmm.Task(n, validation=(x, y), test={"x": [1, 2]} and (x, y), calibration=x) for n in ("a", "b")]
    return made
"""
NAMES = ["embed.weight", "layers.0.mlp.up.weight", "layers.1.mlp.up.weight", "norm.weight"]
