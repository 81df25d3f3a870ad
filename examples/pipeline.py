"""bmm inside a pipeline: two fine-tuned text encoders of your own, your own tasks, tuned and saved.

Runs as it stands: the "models" are a small transformers ViT saved to disk and two copies of it with a few layers
perturbed, so that the code shows the calls and not a result.  python examples/pipeline.py [OUT]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

import bmm


def main(out: Path) -> bmm.StudyResult:
    # 1. Checkpoints: any Hugging Face folders of one architecture.
    config = ViTConfig(image_size=16, patch_size=4, hidden_size=32, intermediate_size=64,
                       num_hidden_layers=2, num_attention_heads=2, num_labels=5)  # fmt: skip
    torch.manual_seed(0)
    base = ViTForImageClassification(config)
    base.save_pretrained(out / "base")
    images = torch.randn(160, 3, 16, 16)
    tasks, experts = [], {}
    for number, name in enumerate(["cats", "dogs"]):
        expert = ViTForImageClassification(config)
        expert.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in expert.vit.encoder.parameters() if hasattr(expert.vit, "encoder") else expert.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
            labels = expert(images).logits.argmax(-1)  # the expert is right on its own task by construction
        expert.save_pretrained(out / name)
        experts[name] = str(out / name)
        # 2. Tasks: validation steers the search, calibration gives Grams, test is scored once at the end.
        tasks.append(
            bmm.Task(
                name,
                validation=({"pixel_values": images[:64]}, labels[:64]),
                test=({"pixel_values": images[64:128]}, labels[64:128]),
                calibration={"pixel_values": images[128:]},
            )
        )
    # 3. Tune. The model is built from base/config.json through transformers.
    result = bmm.tune(
        base=str(out / "base"), experts=experts, tasks=tasks, anchor="task_arithmetic", knobs={"scale": 0.5},
        budget=8, out=str(out / "run"), on_trial=lambda trial, best: print(trial.number, trial.objective),
    )  # fmt: skip
    print("best", result.hyperparameters, "gap closed", f"{result.gap_closed():.2f}")
    # 4. Use it: a Hugging Face folder again.
    merged = ViTForImageClassification.from_pretrained(result.paths["checkpoint"])
    print(merged(images[:1]).logits.shape, "from", result.paths["checkpoint"])
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="bmm-pipeline-")))
