"""Tokenised text, and the classification of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError, did_you_mean
from ..evaluation import Task
from ..evaluation.padded import Padded
from .build import Splits, class_count
from .heads import POOLINGS, Classify, Head
from .rows import Rows, label_numbers


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a checkpoint folder, with a padding token. Raises `RecipeError` where there is none."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise RecipeError("text needs transformers", "pip install 'bmm-tuner[hf]'") from error
    if not Path(folder).is_dir():
        raise RecipeError(f"no tokenizer: {folder} is no folder", "give tokenizer: a folder with tokenizer files")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:
        raise RecipeError(
            f"{folder} has no tokenizer that can be loaded: {' '.join(str(error).split())[:200]}",
            "give tokenizer: a folder with tokenizer files",
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise RecipeError(f"the tokenizer of {folder} has no padding token", "set pad_token in its files")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def text_of(rows: Rows, number: int, row: dict[str, Any], column: str) -> str:
    """A row's text. Raises `RecipeError` naming the row where it is no text."""
    value = row.get(column)
    if not isinstance(value, str):
        raise RecipeError(
            f"{rows.where(number)}: {column} is {type(value).__name__}, not text", "give text in each row"
        )
    return value


def text_classification(
    name: str,
    splits: Splits,
    *,
    tokenizer: str | Path,
    classes: Sequence[str] | None = None,
    head: Head | None = None,
    pooling: str = "auto",
    columns: dict[str, str] | None = None,
    max_tokens: int = 256,
    labels: int | None = None,
    batch_size: int = 64,
) -> Task:
    """Classify sentences, or pairs of them, by a model with logits or by a frozen ``head``.

    Args:
        splits: where the data are, see `bmm.tasks.Splits`; columns ``text``, ``label``, and ``pair`` where it is named.
        tokenizer: the folder it is loaded from.
        classes: names of the labels, in the head's order; not needed where labels are numbers.
        pooling: what of the tokens a linear head reads, one of `POOLINGS`: the model's pooled output, the first token,
            or the mean of all but padding, as sentence encoders have it.
        columns: other names for the columns, such as {"text": "sentence"}.
        max_tokens: longer texts are cut.
        labels: how many classes there are, where neither ``classes`` nor ``head`` says it.
        batch_size: inputs a batch while scoring.
    """
    if pooling not in POOLINGS:
        raise RecipeError(f"pooling: no {pooling!r}", did_you_mean(pooling, POOLINGS))
    if pooling != "auto" and not (head and head.linear):
        raise RecipeError(f"pooling: {pooling} is for a linear head", "give head: a file with weight and bias")
    named = {"text": "text", "label": "label"} | (columns or {})
    words = load_tokenizer(tokenizer)

    def load(rows: Rows, order: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        rows.require(list(named.values()))
        known = classes if classes is not None else rows.classes
        texts, pairs, found = [], [], []
        for number, row in rows.iterate(order):
            texts.append(text_of(rows, number, row, named["text"]))
            if "pair" in named:
                pairs.append(text_of(rows, number, row, named["pair"]))
            found.append((number, row.get(named["label"])))
        targets = label_numbers(rows, found, known, class_count(known, head, labels))
        batch = words(texts, pairs or None, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
        tensors = {k: torch.as_tensor(v) for k, v in batch.items()}
        if "attention_mask" not in tensors:  # a model that is to see the padding
            return tensors, targets
        return Padded(tensors, {"attention_mask": tuple(tensors)}), targets

    return splits.task(name, load, forward=Classify(head, pooling), batch_size=batch_size)
