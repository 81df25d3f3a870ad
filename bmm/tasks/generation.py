"""Tasks judged by what a language model writes: exact match of greedy generations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..evaluation import Task
from ..evaluation.padded import Padded
from .build import Splits
from .likelihood import Template, _stacked, next_token_logits, pair
from .rows import Rows
from .text import load_tokenizer


@dataclass(frozen=True)
class Generate:
    """A forward: prompts -> the tokens written after them (n, t), greedily; texts to the logits of their next tokens.

    Calibration inputs hold a text with its answer and run once, token by token in parallel; scoring inputs hold
    ``prompt_ids`` and ``prompt_mask`` (padded on the left for a decoder).
    """

    max_new_tokens: int
    pad: int
    stop: int | None

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        if "prompt_ids" not in inputs:
            return next_token_logits(model, inputs)
        if not callable(getattr(model, "generate", None)):
            raise RecipeError(
                f"{type(model).__name__} cannot generate", "use a model class with a language model's head"
            )
        ids, mask = inputs["prompt_ids"], inputs["prompt_mask"]
        options = {"do_sample": False, "num_beams": 1, "pad_token_id": self.pad, "eos_token_id": self.stop}
        written: Tensor = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, max_new_tokens=self.max_new_tokens, **options
        )
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            return written[:, 1:]
        return written[:, ids.shape[1] :]


@dataclass(frozen=True)
class ExactMatch:
    """A score: 1 where the decoded text is one of the accepted answers, by their number in ``answers``."""

    words: Any = field(repr=False)
    answers: list[tuple[str, ...]] = field(repr=False)
    pattern: str = ""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        texts = self.words.batch_decode(outputs.tolist(), skip_special_tokens=True)
        found = [
            float(self.extract(text) in self.answers[int(n)]) for text, n in zip(texts, targets.tolist(), strict=True)
        ]
        return torch.tensor(found, device=targets.device)

    def extract(self, text: str) -> str:
        """The answer in a text: the pattern's first group, or its match, where there is one; plainly written."""
        if self.pattern:
            found = re.search(self.pattern, text)
            if not found:
                return "\0"  # matches no answer
            text = found[1] if found.re.groups else found[0]
        return plain(text)


def plain(text: str) -> str:
    """Without case, outer punctuation and repeated spaces."""
    return " ".join(text.lower().split()).strip(" .,;:!?\"'`")


def exact_match(
    name: str,
    splits: Splits,
    *,
    tokenizer: str | Path,
    seq2seq: bool = False,
    template: str = "{question}",
    answer: str = "answer",
    pattern: str = "",
    max_new_tokens: int = 16,
    max_tokens: int = 512,
    batch_size: int = 8,
) -> Task:
    """Write the answer, greedily; it counts where it equals an accepted one, case and outer punctuation aside.

    Args:
        splits: where the data are; the columns the template names, and ``answer``: a text, or a list of accepted ones.
        tokenizer: the folder it is loaded from.
        seq2seq: the model has an encoder.
        template: the prompt; {name} stands for a column.
        answer: the column of the answers.
        pattern: a regular expression that finds the answer in what is written; its first group where it has one.
        max_new_tokens: what is written at most.
        max_tokens: longer prompts lose their beginning.
        batch_size: prompts a batch while scoring.
    """
    words = load_tokenizer(tokenizer)
    prompt, answers = Template(template), list[tuple[str, ...]]()
    try:
        re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"pattern {pattern!r}: {error}", "a Python regular expression") from error

    def load(rows: Rows, order: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        prompts, targets = [], []
        for number, row, text in prompt.read(rows, order, answer):
            tokens = words(text, add_special_tokens=True)["input_ids"]
            prompts.append(tokens[-max_tokens:])
            targets.append(len(answers))
            answers.append(tuple(map(plain, _accepted(rows, number, row.get(answer)))))
        width, pad = max(map(len, prompts)), int(words.pad_token_id)
        gaps = [[pad] * (width - len(p)) for p in prompts]
        ids = [p + g if seq2seq else g + p for p, g in zip(prompts, gaps, strict=True)]
        ones = [[1] * len(p) for p in prompts]
        zeros = [[0] * len(g) for g in gaps]
        mask = [o + z if seq2seq else z + o for o, z in zip(ones, zeros, strict=True)]
        inputs = {"prompt_ids": torch.tensor(ids), "prompt_mask": torch.tensor(mask)}
        return Padded(inputs, {"prompt_mask": tuple(inputs)}), torch.tensor(targets)

    def calibrate(rows: Rows, order: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        texts = []
        for number, row, text in prompt.read(rows, order, answer):
            right = " " + _accepted(rows, number, row.get(answer))[0]
            texts.append([pair(words, text, right, max_tokens, seq2seq)])
        found = {k: v[:, 0] for k, v in _stacked(texts, int(words.pad_token_id), seq2seq).items()}
        option = found.pop("option_mask")
        targets = found["labels"] if seq2seq else found["input_ids"][:, 1:].masked_fill(option[:, 1:] == 0, -1)
        return found, targets

    forward = Generate(max_new_tokens, int(words.pad_token_id), words.eos_token_id)
    score = ExactMatch(words, answers, pattern)
    return splits.task(name, load, calibrate, forward=forward, score=score, batch_size=batch_size)


def _accepted(rows: Rows, number: int, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []
    if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise RecipeError(f"{rows.where(number)}: the answer is {value!r}", "a text, or a list of accepted texts")
    return texts
