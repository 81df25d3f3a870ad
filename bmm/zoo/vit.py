"""The zoo's vision transformer: a convolutional stem, sixteen tokens, pre-norm blocks, mean pooling.

Small enough for two CPU cores, and made of the modules a merge has to deal with: convolutions,
separate query/key/value projections, MLPs, norms and an additive position embedding.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ViTConfig:
    """Shape of the zoo's encoder; ``stem`` gives the two convolutions' output channels."""

    image_size: int = 32
    channels: int = 3
    stem: tuple[int, int] = (32, 64)
    width: int = 160
    depth: int = 4
    heads: int = 5
    mlp_width: int = 480
    model_type: str = "bmm_vit"

    @property
    def tokens(self) -> int:
        return (self.image_size // 8) ** 2

    @classmethod
    def load(cls, folder: Path | str) -> ViTConfig:
        raw = json.loads((Path(folder) / "config.json").read_text())
        raw["stem"] = tuple(raw["stem"])
        return cls(**{k: v for k, v in raw.items() if k in cls.__dataclass_fields__})

    def save(self, folder: Path | str) -> None:
        text = json.dumps(asdict(self) | {"architectures": ["ZooViT"]}, indent=2)
        (Path(folder) / "config.json").write_text(text + "\n")


class Attention(nn.Module):
    """Multi-head self-attention with separate projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (b, s, width)
        b, s, width = x.shape
        split = (b, s, self.heads, width // self.heads)
        q = self.q(x).view(split).transpose(1, 2)  # (b, heads, s, d)
        k = self.k(x).view(split).transpose(1, 2)
        v = self.v(x).view(split).transpose(1, 2)
        # Explicit products: on CPU the fused kernel's backward pass is several times slower at 16 tokens.
        weights = (q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).reshape(b, s, width))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config.width, config.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Stem(nn.Module):
    """Two stride-2 convolutions, then a 2x2 patch embedding: 32x32 pixels become 4x4 tokens."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        a, b = config.stem
        self.conv1 = nn.Conv2d(config.channels, a, 3, stride=2, padding=1)
        self.norm1 = nn.GroupNorm(1, a)
        self.conv2 = nn.Conv2d(a, b, 3, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(1, b)
        self.patch = nn.Conv2d(b, config.width, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.conv1(x)))
        x = F.gelu(self.norm2(self.conv2(x)))
        return self.patch(x).flatten(2).transpose(1, 2)  # (b, s, width)


class ZooViT(nn.Module):
    """Image encoder: uint8 or float images (b, 1 or 3, 32, 32) in, features (b, width) out."""

    def __init__(self, config: ViTConfig | None = None) -> None:
        super().__init__()
        self.config = config or ViTConfig()
        self.stem = Stem(self.config)
        self.pos = nn.Parameter(torch.zeros(self.config.tokens, self.config.width))
        self.blocks = nn.ModuleList(Block(self.config) for _ in range(self.config.depth))
        self.norm = nn.LayerNorm(self.config.width)
        nn.init.normal_(self.pos, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        x = images.float() / 127.5 - 1.0 if images.dtype == torch.uint8 else images
        if x.shape[1] == 1:
            x = x.expand(-1, self.config.channels, -1, -1)
        x = self.stem(x) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1)
