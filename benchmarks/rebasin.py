"""Git Re-Basin on networks trained here: barriers between two seeds before and after matching.

    python benchmarks/rebasin.py            # a minute or two on one core
    python benchmarks/rebasin.py --quick    # narrow networks, a few seconds

Two MLPs and two ResNets with BatchNorm are trained on scikit-learn's digits (1,797 images of 8x8; installed with
ax-platform) from different seeds and orders of the data, written as checkpoints, and aligned with `bmm.align`. The
barrier is over the line from one to the other, on 600 held-out images.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import bmm
from bmm.report import markdown, percent


class MLP(nn.Sequential):
    """Three hidden layers on 64 pixels."""

    def __init__(self, width: int) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs in (64, width, width):
            layers += [nn.Linear(inputs, width), nn.ReLU()]
        super().__init__(*layers, nn.Linear(width, 10))


class Block(nn.Module):
    """Two convolutions around a skip connection, with a strided 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.skip: nn.Module = nn.Identity()
        if stride != 1:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.skip(x))


class ResNet(nn.Module):
    """A stem and two stages of two blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.stage1 = nn.Sequential(Block(width, width, 1), Block(width, width, 1))
        self.stage2 = nn.Sequential(Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1))
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(F.relu(self.bn(self.conv(x)))))
        return self.fc(x.mean((2, 3)))


def data() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    return images[order], torch.from_numpy(digits.target)[order]


def train(network: nn.Module, x: Tensor, y: Tensor, epochs: int, decay: float, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(y) // 64)
    optimiser = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=decay, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=steps)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(64)[: len(y) // 64]:
            optimiser.zero_grad()
            F.cross_entropy(network(x[rows]), y[rows]).backward()
            optimiser.step()
            schedule.step()
    return network.eval()


def measure(build, name: str, epochs: int, decay: float, folder: Path, points: int) -> list[list[str]]:
    x, y = data()
    task = bmm.Task("digits", validation=(x[1197:], y[1197:]), calibration=x[:1197])
    for seed in (0, 1):
        torch.manual_seed(seed)
        network = train(build(), x[:1197], y[:1197], epochs, decay, seed)
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / f"{name}{seed}.safetensors")
    start = time.perf_counter()
    found = bmm.align(
        folder / f"{name}0.safetensors", [folder / f"{name}1.safetensors"], tasks=[task], model=build, points=points
    )
    seconds = time.perf_counter() - start
    (before, after), (history, passes) = found.matching.similarity[0], (found.matching.history, found.matching.passes)
    assert list(history) == sorted(history), "the objective fell"
    print(f"{name}: cosine {before:.3f} to {after:.3f}, {passes} passes; matching and barriers {seconds:.1f} s")
    return [
        [name, kind, f"{b.loss:.3f}", percent(b.score), percent(b.scores[points // 2]), percent(b.scores[0]),
         percent(b.scores[-1])]
        for kind, b in found.barriers[f"{name}1"].items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mlp-width", type=int, default=512)
    parser.add_argument("--resnet-width", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--decay", type=float, default=0.02, help="weight decay")
    parser.add_argument("--points", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.mlp_width, args.resnet_width, args.epochs, args.points = 64, 8, 4, 5
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        rows += measure(lambda: MLP(args.mlp_width), "mlp", args.epochs, args.decay, Path(folder), args.points)
        rows += measure(lambda: ResNet(args.resnet_width), "resnet", args.epochs, args.decay, Path(folder), args.points)
    header = ["network", "matching", "loss barrier", "accuracy barrier (%)", "halfway (%)", "one end", "other end"]
    sizes = f"MLP 3 x {args.mlp_width}, ResNet width {args.resnet_width}"
    print(f"\n{sizes}; {args.epochs} epochs, weight decay {args.decay}; 600 validation images\n")
    print(markdown(header, rows))
    print(f"\n{platform.machine()}, {args.threads} thread(s), torch {torch.__version__}")


if __name__ == "__main__":
    main()
