"""Checkpoints of a small training run."""

import json
import textwrap

import torch
from safetensors.torch import save_file

STEPS = (50, 100, 200, 1000)


def state(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(6, 5, generator=generator).to(dtype),
        "b.bias": torch.randn(4, generator=generator).to(dtype),
        "steps": torch.tensor(seed),
    }


def save(folder, tensors, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "x"} | config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def mean(seeds, shares=None, name="a.weight"):
    shares = shares or [1 / len(seeds)] * len(seeds)
    return sum(a * state(s)[name].double() for a, s in zip(shares, seeds, strict=True))


# -- BatchNorm ---------------------------------------------------------------------------------------------------------

SOURCE = textwrap.dedent(
    """
    import torch
    from torch import nn
    import bmm


    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.bn = nn.BatchNorm2d(4)
            self.drop = nn.Dropout(0.5)
            self.out = nn.Linear(4, 3)
            self.norm = nn.BatchNorm1d(3, momentum=0.3)

        def forward(self, x):
            return self.norm(self.out(self.drop(torch.relu(self.bn(self.conv(x))).mean((2, 3)))))


    def model():
        return Net()


    def tasks():
        x = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        y = torch.zeros(50, dtype=torch.int64)
        return [bmm.Task("t", validation=(x, y), calibration=3 * x + 1, batch_size=20)]
    """
)
