"""What the two experts do, measured without labels: how near a model is to each expert, on reactions.

classes: share of reactions of which it predicts the class (of 50) that the expert predicts, by the expert's own head.
fingerprint: cosine of its fingerprint, the first token's last hidden state, with the expert's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bmm
from bmm.tasks.heads import Classify
from examples.rxn.reactions import reactions

SIZES = {"calibration": 64, "validation": 100, "test": 400}


def fingerprint(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """(n, 256): what rxnfp calls a reaction's fingerprint."""
    encoder: Any = model.bert
    return encoder(**inputs).last_hidden_state[:, 0]


def cosine(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cosine_similarity(outputs.float(), targets, dim=-1)


def make(models: Path | None = None) -> list[bmm.Task]:
    """One task an expert; their targets are the expert's own outputs. ``models``: $BMM_RXN, else models here."""
    from transformers import AutoTokenizer, BertForSequenceClassification, logging

    logging.set_verbosity_error()  # that the fingerprint's expert has no classifier is as it should be
    models = models or Path(os.environ.get("BMM_RXN", Path(__file__).parent / "models"))
    words = AutoTokenizer.from_pretrained(models / "base")
    texts = reactions(sum(SIZES.values()))
    tasks = []
    for name in ("classes", "fingerprint"):
        forward = Classify(bmm.tasks.load_head(models / name)) if name == "classes" else fingerprint
        expert = BertForSequenceClassification.from_pretrained(models / name).eval()
        start, splits = 0, {}
        for split, size in SIZES.items():
            batch = words(
                texts[start : start + size], padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
            inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
            start += size
            if split == "calibration":
                splits[split] = inputs
                continue
            with torch.inference_mode():
                outputs = forward(expert, inputs)
            splits[split] = (inputs, outputs.argmax(-1) if name == "classes" else outputs.clone())
        score = {} if name == "classes" else {"score": cosine}
        tasks.append(bmm.Task(name, **splits, forward=forward, batch_size=100, **score))
    return tasks
