"""A small real family: one base, three experts trained from it on three tasks, saved as users' folders are.

Built once a test session; everything a run needs lies in one folder, with a tasks file a recipe can point to.
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

TASKS = ("ring", "stripe", "corner")
SOURCE = textwrap.dedent(
    '''
    """Model and tasks of the test family."""

    from pathlib import Path

    import torch
    from safetensors.torch import load_file
    from torch import nn

    import bmm

    HERE = Path(__file__).parent


    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 6, 3, stride=2, padding=1)
            self.q = nn.Linear(96, 24)
            self.k = nn.Linear(96, 24)
            self.norm = nn.LayerNorm(24)
            self.fc1 = nn.Linear(24, 40)
            self.out = nn.Linear(40, 12, bias=False)
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            h = torch.relu(self.conv(x)).flatten(1)
            h = self.norm(torch.tanh(self.q(h)) * self.k(h))
            return self.out(torch.relu(self.fc1(h)))


    def model():
        return Net()


    def tasks():
        found = []
        for name in ("ring", "stripe", "corner"):
            d = load_file(HERE / "data" / f"{name}.safetensors")
            found.append(
                bmm.Task(
                    name,
                    validation=(d["validation_x"], d["validation_y"]),
                    test=(d["test_x"], d["test_y"]),
                    calibration=d["calibration_x"],
                    forward=lambda net, x, head=d["head"]: net(x) @ head.T,
                )
            )
        return found
    '''
).lstrip()


@dataclass(frozen=True)
class Family:
    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def experts(self) -> dict[str, str]:
        return {name: str(self.folder / name) for name in TASKS}

    @property
    def file(self) -> Path:
        return self.folder / "tasks.py"

    def recipe(self, **keys: object) -> dict[str, object]:
        return {
            "base": str(self.base),
            "experts": self.experts,
            "tasks": f"{self.file}:tasks",
            "model": f"{self.file}:model",
            "groups": "role",
            "cache": str(self.folder / "cache"),
        } | keys

    def yaml(self, path: Path, **keys: object) -> Path:
        path.write_text(json.dumps(self.recipe(**keys)))  # JSON is YAML
        return path


def _images(n: int, task: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy 8x8 pictures whose class is a radius, an orientation or a corner."""
    labels = torch.randint(4, (n,), generator=generator)
    ys, xs = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    jitter = 0.6 * torch.randn(n, 2, 1, 1, generator=generator)
    y, x = ys - 3.5 + jitter[:, 0], xs - 3.5 + jitter[:, 1]
    k = labels[:, None, None].float()
    if task == "ring":
        picture = torch.exp(-((torch.hypot(x, y) - 1 - k) ** 2))
    elif task == "stripe":
        picture = torch.cos(1.5 * (x * torch.cos(k * 0.785) + y * torch.sin(k * 0.785)))
    else:
        cx, cy = 2.5 * (2 * (labels % 2) - 1), 2.5 * (2 * (labels // 2) - 1)
        picture = 1.5 * torch.exp(-((x - cx[:, None, None]) ** 2 + (y - cy[:, None, None]) ** 2) / 3)
    return (picture + 0.5 * torch.randn(n, 8, 8, generator=generator))[:, None], labels


def build(folder: Path) -> Family:
    """Train base and experts (a few seconds) and write the folder."""
    family = Family(folder)
    (folder / "data").mkdir(parents=True)
    family.file.write_text(SOURCE)
    space: dict[str, object] = {"__file__": str(family.file), "__name__": "family"}
    exec(compile(SOURCE, str(family.file), "exec"), space)
    generator = torch.Generator().manual_seed(5)
    data, heads = {}, {}
    for name in TASKS:
        parts = {p: _images(n, name, generator) for p, n in
                 (("joint", 40), ("train", 1500), ("calibration", 96), ("validation", 160), ("test", 400))}  # fmt: skip
        data[name], heads[name] = parts, nn.Parameter(0.3 * torch.randn(4, 12, generator=generator))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = space["model"]()  # type: ignore[operator]
    _train(net, [(*data[n]["joint"], heads[n]) for n in TASKS], 150, [*net.parameters(), *heads.values()])
    start = {k: v.clone() for k, v in net.state_dict().items()}
    _save(family.base, start)
    for name in TASKS:
        net.load_state_dict(start)
        _train(net, [(*data[name]["train"], heads[name].detach())], 120, list(net.parameters()))
        _save(folder / name, net.state_dict())
        flat = {f"{p}_{a}": t.contiguous() for p, pair in data[name].items() for a, t in zip("xy", pair, strict=True)}
        save_file(flat | {"head": heads[name].detach().contiguous()}, folder / "data" / f"{name}.safetensors")
    return family


def _train(net: nn.Module, sets: list, steps: int, parameters: list) -> None:
    opt = torch.optim.AdamW(parameters, lr=3e-3)
    for step in range(steps):
        loss = torch.zeros(())
        for x, y, head in sets:
            rows = torch.randint(len(y), (64,), generator=torch.Generator().manual_seed(step))
            loss = loss + nn.functional.cross_entropy(net(x[rows]) @ head.T, y[rows])
        opt.zero_grad()
        loss.backward()
        opt.step()


def _save(folder: Path, state: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["Net"], "model_type": "family"}')
    save_file({k: v.contiguous().clone() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})
