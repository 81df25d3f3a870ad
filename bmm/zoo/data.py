"""Read a zoo task: images from npz, the frozen head from safetensors."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ..evaluation import Task


def classify(model: nn.Module, images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Logits (b, classes) of the encoder's features behind a task's frozen linear head."""
    features = model(images)
    return F.linear(features.float(), weight.to(features.device), bias.to(features.device))


def load_task(folder: Path, name: str) -> Task:
    """The task ``name`` whose data and head lie under ``folder``."""
    heads = load_file(folder / "heads.safetensors")
    with np.load(folder / "data" / f"{name}.npz", allow_pickle=False) as raw:
        arrays = {key: torch.from_numpy(raw[key]) for key in raw.files}
    return Task(
        name,
        validation=(arrays["validation_x"], arrays["validation_y"].long()),
        test=(arrays["test_x"], arrays["test_y"].long()),
        calibration=arrays["calibration_x"],
        forward=partial(classify, weight=heads[f"{name}.weight"].float(), bias=heads[f"{name}.bias"].float()),
        batch_size=128,  # on a CPU a quarter faster than 512: activations stay in its cache
    )
