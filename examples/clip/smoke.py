"""clip.py without a hub: python examples/clip/smoke.py FOLDER [flags of clip.py]

Makes what the hub would give in FOLDER/models and FOLDER/data, in the hub's layout but small: CLIP of width 16 with
random weights, a tokenizer of the prompts' words, and pictures of noise. Then runs clip.py on it. Scores mean nothing.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clip import TASKS, main
from datasets import ClassLabel, Dataset, Features, Image
from PIL.Image import fromarray
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerFast

NAME = "clip-vit-base-patch32"
SIZE = 16  # pixels
ROWS = 24  # images a split
BOUNDS = ["<|startoftext|>", "<|endoftext|>"]


def make_base(folder: Path, tasks: Sequence[str]) -> CLIPModel:
    """CLIP with its tokenizer and image processor."""
    sides = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = make_tokenizer(folder, tasks)
    text = {"vocab_size": words, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1} | sides
    vision = {"image_size": SIZE, "patch_size": 8} | sides
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model.save_pretrained(folder)
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIZE},
                 "crop_size": {"height": SIZE, "width": SIZE}, "resample": 3}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def make_expert(folder: Path, base: CLIPModel) -> CLIPModel:
    """CLIP with another vision tower, of which the tower alone is saved, under the names that the hub's files have."""
    expert = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in expert.vision_model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    tower = {n: t.clone() for n, t in expert.state_dict().items() if n.startswith("vision_model.")}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tower, folder / "model.safetensors", {"format": "pt"})
    return expert


def make_tokenizer(folder: Path, tasks: Sequence[str]) -> int:
    """A tokenizer of whole words; returns how many there are."""
    texts = " ".join(template for task in tasks for template in TASKS[task].templates)
    known = dict.fromkeys([*BOUNDS, "?", *(f"c{n}" for n in range(400)), *re.findall(r"\w+|[^\w\s]+", texts)])
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(known)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BOUNDS[0]} $A {BOUNDS[1]}", special_tokens=list(zip(BOUNDS, (0, 1), strict=True))
    )
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=BOUNDS[0], eos_token=BOUNDS[1], pad_token=BOUNDS[1],
                            unk_token="?").save_pretrained(folder)  # fmt: skip
    return len(known)


def make_data(folder: Path, task: str, names: list[str], label: Callable[[list[Any]], list[int]]) -> None:
    """Two files of noise for the training split and one for the test split, with the classes' names in the schema."""
    noise = np.random.default_rng(0)
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    place = folder / TASKS[task].folder
    place.mkdir(parents=True, exist_ok=True)
    for split, shards in (("train", 2), ("test", 1)):
        for shard in range(shards):
            colours = noise.integers(0, 200, (ROWS // shards, 1, 1, 3))
            pixels = (colours + noise.integers(0, 55, (ROWS // shards, SIZE, SIZE + 4, 3))).astype(np.uint8)
            images = [fromarray(image) for image in pixels]
            made = Dataset.from_dict({"image": images, "label": label(images)}, features=features)
            made.to_parquet(place / f"{split}-{shard:05}-of-{shards:05}.parquet")


def labeller(expert: CLIPModel, folder: Path, task: str, names: list[str]) -> Callable[[list[Any]], list[int]]:
    """What the expert itself says, as transformers computes it: a chain that keeps it whole scores exactly 1."""
    words, convert = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    heads = []
    with torch.inference_mode():
        for template in TASKS[task].templates:
            batch = words([template.format(name) for name in names], padding=True, return_tensors="pt")
            heads.append(expert(**batch, pixel_values=torch.zeros(1, 3, SIZE, SIZE)).text_embeds)  # (classes, 8)
    head = torch.stack(heads).mean(0)
    head = head / head.norm(dim=1, keepdim=True)

    def label(images: list[Any]) -> list[int]:
        pixels = convert(images=images, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            seen = expert(input_ids=torch.tensor([[0, 1]]), pixel_values=pixels).image_embeds
        return [int(n) for n in (seen @ head.T).argmax(1)]

    return label


def make(folder: Path, tasks: Sequence[str]) -> None:
    """A hub of these tasks in ``folder``."""
    torch.manual_seed(0)
    base = make_base(folder / "models" / NAME, tasks)
    for task in tasks:
        source, names = TASKS[task], [f"c{n}" for n in range(TASKS[task].classes)]
        expert = make_expert(folder / "models" / f"{NAME}_{source.expert}", base)
        make_data(folder / "data" / task, task, names, labeller(expert, folder / "models" / NAME, task, names))


if __name__ == "__main__":
    folder, tasks = Path(sys.argv[1]), ["eurosat", "mnist", "dtd"]
    make(folder, tasks)
    small = ["--calibration", "8", "--validation", "8", "--test", "12", "--budget", "3"]
    places = ["--models", str(folder / "models"), "--data", str(folder / "data"), "--out", str(folder / "run")]
    sys.exit(main([*small, *places, "--tasks", *tasks, *sys.argv[2:]]))
