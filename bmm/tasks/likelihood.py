"""Tasks judged by the likelihood a language model gives to text: multiple choice and perplexity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RecipeError
from ..evaluation import Task
from ..evaluation.padded import Padded
from ..evaluation.task import categorical
from .build import Splits
from .rows import Rows, label_numbers
from .text import load_tokenizer, text_of

IMPOSSIBLE = -1e30
"""The score of an option that is not there, where questions have unlike numbers of options."""


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a transformers model reads its prompt with an encoder."""
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True


def next_token_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits (n, tokens - 1, words) of every token but the first given those before; an encoder-decoder's of its
    ``labels``, (n, tokens, words)."""
    if "labels" in inputs:
        rest = {k: v for k, v in inputs.items() if k != "labels"}
        shifted = model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"].clone())  # type: ignore[operator]
        return model(**rest, decoder_input_ids=shifted).logits
    return model(**inputs).logits[:, :-1]


@dataclass(frozen=True)
class OptionLikelihood:
    """A forward: questions with k options each -> (n, k), the log-likelihood of every option given its question.

    ``inputs``: tokens (n, k, l) with ``attention_mask`` and ``option_mask`` (the tokens that are the option's); for an
    encoder-decoder ``labels`` (n, k, m), below 0 where padded. ``normalise``: divided by the option's tokens.
    """

    normalise: bool = True

    @property
    def cache_key(self) -> str:
        """Tells the two kinds apart."""
        return str(self.normalise)

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        count, options = inputs["input_ids"].shape[:2]
        flat = {k: v.reshape(count * options, v.shape[-1]) for k, v in inputs.items()}
        option = flat.pop("option_mask") > 0
        targets = flat["labels"] if "labels" in flat else flat["input_ids"][:, 1:].masked_fill(~option[:, 1:], -1)
        total = categorical(next_token_logits(model, flat), targets)  # (n * k,)
        length = (targets >= 0).sum(1)
        value = total / length.clamp_min(1) if self.normalise else total
        return value.masked_fill(length == 0, IMPOSSIBLE).reshape(count, options)


def multiple_choice(
    name: str,
    splits: Splits,
    *,
    tokenizer: str | Path,
    seq2seq: bool = False,
    template: str = "{question}",
    options: Sequence[str] | None = None,
    option_template: str = " {}",
    normalise: bool = True,
    columns: dict[str, str] | None = None,
    max_tokens: int = 512,
    batch_size: int = 8,
) -> Task:
    """Choose the option a language model finds likeliest after the question (as in arXiv 2005.14165, section 2.4).

    Args:
        splits: where the data are; columns ``options`` (a list of texts a row) and ``answer`` (number or text of one),
            and those the template names.
        tokenizer: the folder it is loaded from.
        seq2seq: the model has an encoder for the question and a decoder for the option.
        template: the prompt; {name} stands for a column.
        options: the options of every row, in place of a column.
        option_template: how an option follows the prompt.
        normalise: log-likelihood per token, so that long options do not lose for their length.
        columns: other names for ``options`` and ``answer``.
        max_tokens: longer prompts lose their beginning.
        batch_size: questions a batch while scoring.
    """
    named = {"options": "options", "answer": "answer"} | (columns or {})
    words = load_tokenizer(tokenizer)
    prompt = Template(template)

    def load(rows: Rows, order: Sequence[int], only_answer: bool = False) -> tuple[dict[str, Tensor], Tensor]:
        columns = [*([] if options else [named["options"]]), named["answer"]]
        questions, answers = [], []
        for number, row, question in prompt.read(rows, order, *columns):
            texts = _options(rows, number, options or row.get(named["options"]))
            answer = int(label_numbers(rows, [(number, row.get(named["answer"]))], texts, None))
            answers.append(answer)
            chosen = [texts[answer]] if only_answer else texts
            questions.append([pair(words, question, option_template.format(t), max_tokens, seq2seq) for t in chosen])
        inputs = _stacked(questions, int(words.pad_token_id), seq2seq)
        return inputs, torch.zeros(len(answers), dtype=torch.long) if only_answer else torch.tensor(answers)

    def calibrate(rows: Rows, order: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        return load(rows, order, only_answer=True)

    return splits.task(name, load, calibrate, forward=OptionLikelihood(normalise), batch_size=batch_size)


def _options(rows: Rows, number: int, value: Any) -> list[str]:
    texts = list(value) if isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1 else []
    if len(texts) < 2 or not all(isinstance(t, str) and t for t in texts) or len(set(texts)) < len(texts):
        raise RecipeError(f"{rows.where(number)}: options are {value!r}", "a list of two or more unlike texts")
    return texts


def pair(words: Any, prompt: str, answer: str, limit: int, seq2seq: bool = False) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of what follows it; the prompt loses its beginning where both are longer than ``limit``.

    Both are tokenised as one text, so that the seam is where the tokenizer puts it. Raises `RecipeError` for an answer
    without tokens.
    """
    if seq2seq:
        first, second = words(prompt)["input_ids"], words(answer.strip())["input_ids"]
        return first[-limit:], second[:limit]
    whole = words(prompt + answer)["input_ids"]
    start = words(prompt)["input_ids"]
    same = 0
    while same < min(len(start), len(whole)) and start[same] == whole[same]:
        same += 1
    before, after = whole[:same], whole[same:]
    if not after:
        raise RecipeError(f"the answer {answer!r} has no tokens", "give it text")
    if not before:
        lead = words.bos_token_id if words.bos_token_id is not None else words.eos_token_id
        if lead is None:
            raise RecipeError("an empty prompt, and a tokenizer without a first token", "give the template some text")
        before = [lead]
    after = after[: limit - 1]
    return before[-max(1, limit - len(after)) :], after


def _stacked(questions: list[list[tuple[list[int], list[int]]]], pad: int, seq2seq: bool) -> Padded:
    most = max(len(q) for q in questions)
    flat = [p for q in questions for p in [*q, *[([pad], [])] * (most - len(q))]]

    def stacked(rows: list[list[int]], fill: int) -> Tensor:
        width = max(1, *(len(r) for r in rows)) if rows else 1
        table = torch.tensor([r + [fill] * (width - len(r)) for r in rows])
        return table.reshape(len(questions), most, width)

    if seq2seq:
        first, second = [p for p, _ in flat], [a for _, a in flat]
        tensors = {
            "input_ids": stacked(first, pad),
            "attention_mask": stacked([[1] * len(p) for p in first], 0),
            "labels": stacked(second, -100),
            # the decoder reads the answer one place later
            "decoder_attention_mask": stacked([[1] * max(1, len(a)) for a in second], 0),
            "option_mask": stacked([[1] * len(a) for a in second], 0),
        }
        answers = ("labels", "decoder_attention_mask", "option_mask")
        return Padded(tensors, {"attention_mask": ("input_ids", "attention_mask"), "decoder_attention_mask": answers})
    tensors = {
        "input_ids": stacked([p + a for p, a in flat], pad),
        "attention_mask": stacked([[1] * len(p + a) for p, a in flat], 0),
        "option_mask": stacked([[0] * len(p) + [1] * len(a) for p, a in flat], 0),
    }
    return Padded(tensors, {"attention_mask": tuple(tensors)})


@dataclass(frozen=True)
class Template:
    """A prompt with places for columns: "Question: {question} Answer:"."""

    text: str

    @property
    def columns(self) -> list[str]:
        """The columns it names. Raises `RecipeError` for braces that name none."""
        import string

        try:
            found = [name for _, name, _, _ in string.Formatter().parse(self.text) if name is not None]
        except ValueError as error:
            raise RecipeError(f"template {self.text!r}: {error}", "write {column}, and {{ for a brace") from error
        if "" in found:
            raise RecipeError(f"template {self.text!r}: braces without a column", "write {column}")
        return found

    def read(self, rows: Rows, order: Sequence[int], *columns: str) -> Iterator[tuple[int, dict[str, Any], str]]:
        """The rows of these numbers, with their numbers before and their prompts after them. Raises `RecipeError` for a
        column that is not there: its own, or one of ``columns``."""
        own = self.columns
        rows.require([*columns, *own])
        for number, row in rows.iterate(order):
            yield number, row, self.text.format(**{c: text_of(rows, number, row, c) for c in own})


def token_probability(outputs: Tensor, targets: Tensor) -> Tensor:
    """exp(mean log p) of the tokens ``targets`` (n, l), below 0 where there is none: 1 / perplexity of each text, (n,).

    Between 0 and 1 and higher is better, so that it can be compared with an expert's by their ratio. Targets beyond the
    outputs' length are padding that the batch went without.
    """
    targets = targets[:, : outputs.shape[1]]
    return (categorical(outputs, targets) / (targets >= 0).sum(1).clamp_min(1)).exp()


def perplexity(
    name: str,
    splits: Splits,
    *,
    tokenizer: str | Path,
    template: str = "{text}",
    max_tokens: int = 256,
    batch_size: int = 8,
) -> Task:
    """Predict text token by token. The score of a text is 1 / perplexity = exp(-negative log-likelihood per token).

    Args:
        splits: where the data are; the column ``text``, or those that ``template`` names.
        tokenizer: the folder it is loaded from.
        template: what is read of a row; {name} stands for a column.
        max_tokens: texts are cut into windows of so many tokens, each an input of its own.
        batch_size: windows a batch while scoring.
    """
    words = load_tokenizer(tokenizer)
    shape = Template(template)

    def load(rows: Rows, order: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        windows = []
        for _, _, text in shape.read(rows, order):
            tokens = words(text, truncation=False)["input_ids"]
            cut = [tokens[k : k + max_tokens] for k in range(0, len(tokens), max_tokens)]
            windows += [w for w in cut if len(w) > 1]
        if not windows:
            raise RecipeError(f"{rows.path}: no text of two or more tokens", "perplexity needs something to predict")
        inputs = _stacked([[([], w)] for w in windows], int(words.pad_token_id), False)
        batch = {k: inputs[k][:, 0] for k in ("input_ids", "attention_mask")}
        return Padded(batch, {"attention_mask": tuple(batch)}), batch["input_ids"][:, 1:].masked_fill(
            batch["attention_mask"][:, 1:] == 0, -1
        )

    return splits.task(name, load, forward=next_token_logits, score=token_probability, batch_size=batch_size)
