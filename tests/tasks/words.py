"""A tokenizer of 48 words, as transformers saves it."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = [
    *SPECIAL,
    "is",
    "a",
    "photo",
    "of",
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "sky",
    "the",
    "good",
    "bad",
    "film",
    "?",
]
VOCABULARY = [*WORDS, *(f"w{n}" for n in range(48 - len(WORDS)))]


def save_tokenizer(folder: Path, end: bool = False) -> PreTrainedTokenizerFast:
    """``end``: every text gets </s>, as T5 and CLIP want it."""
    inner = Tokenizer(models.WordLevel({w: n for n, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if end:
        inner.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return tokenizer
