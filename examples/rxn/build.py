"""Make Hugging Face folders of rxnfp's three published models: a base and its two fine-tunes.

    python -m examples.rxn.build

PyPI rxnfp 0.1.0 (MIT; Schwaller et al., doi 10.1038/s42256-020-00284-w) holds BERTs of 12 layers and width 256 as they
left training. Converted are: the encoder's names (one expert lacks the prefix ``bert.``), the base's language-model and
next-sentence heads (left out, no expert has them), safetensors for pickles, and a tokenizer that transformers loads.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from examples import packages
from examples.rxn.reactions import TOKEN

HERE = Path(__file__).parent
PUBLISHED = {"base": "bert_pretrained", "fingerprint": "bert_ft", "classes": "bert_ft_10k_25s"}


def converted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder under ``bert.``, the classifier where there is one, and nothing else."""
    if not any(name.startswith("bert.") for name in tensors):
        tensors = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    return {n: t.contiguous() for n, t in tensors.items() if n.startswith(("bert.", "classifier."))}


def tokenizer(vocabulary: list[str]) -> Any:
    """Splits SMILES into the tokens of the vocabulary, with [CLS] before and [SEP] after them."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN.pattern), "isolated")
    special = [(word, vocabulary.index(word)) for word in ("[CLS]", "[SEP]")]
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], vocabulary: list[str]) -> None:
    """One model as a folder of transformers."""
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    save_file(converted(tensors), partial / "model.safetensors", metadata={"format": "pt"})
    labels = {str(n): f"class {n}" for n in range(50)}
    kept = {k: v for k, v in config.items() if k not in ("id2label", "label2id", "num_labels", "finetuning_task")}
    kept |= {"architectures": ["BertForSequenceClassification"], "model_type": "bert", "id2label": labels}
    (partial / "config.json").write_text(json.dumps(kept, indent=2))
    tokenizer(vocabulary).save_pretrained(partial)
    partial.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=HERE / "models")
    parser.add_argument("--packages", type=Path, default=HERE / "packages")
    args = parser.parse_args()
    source = packages.from_pypi("rxnfp", "0.1.0", args.packages) / "rxnfp" / "models" / "transformers"
    for name, published in PUBLISHED.items():
        if (args.models / name).exists():
            continue
        tensors = torch.load(source / published / "pytorch_model.bin", weights_only=True, map_location="cpu")
        config = json.loads((source / published / "config.json").read_text())
        vocabulary = (source / published / "vocab.txt").read_text().splitlines()
        write(args.models / name, tensors, config, vocabulary)
        print(args.models / name)


if __name__ == "__main__":
    main()
