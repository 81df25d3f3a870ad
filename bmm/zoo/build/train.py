"""Training of the base and of the experts: three stages, each restartable from its last checkpoint.

1. pretrain: glyphs of scripts that are no task, clip art.
2. joint: the same plus a small share of all twenty tasks, with one linear head a task; heads frozen after.
3. experts: the encoder alone, on one task's own training split.
"""

from __future__ import annotations

import functools
import logging
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import VIT20
from ..vit import ViTConfig, ZooViT
from .tasks import Split, pretraining, task_splits

log = logging.getLogger("bmm.zoo.build")


@dataclass(frozen=True)
class Schedule:
    steps: int
    rate: float
    batch: int = 128
    decay: float = 0.05
    warmup: int = 200


PRETRAIN = Schedule(steps=14000, rate=1e-3)
JOINT = Schedule(steps=2000, rate=4e-4)
JOINT_SHARE = 200  # images of each task that the base sees; disjoint from every other split
EXPERT = Schedule(steps=900, rate=5e-5, decay=0.0, warmup=50)


class Pool:
    """A labelled set in memory with seeded mini-batches, shifted by up to two pixels."""

    def __init__(self, split: Split) -> None:
        self.x, self.y = (torch.from_numpy(a) for a in split)

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.y), (n,), generator=generator)
        dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
        # One shift a batch: cheap, and over many batches the same augmentation.
        x = F.pad(self.x[rows].float(), (2, 2, 2, 2), mode="replicate")[..., 2 + dy : 34 + dy, 2 + dx : 34 + dx]
        x = x / 127.5 - 1.0
        return x.expand(-1, 3, -1, -1), self.y[rows]


def optimiser(modules: list[nn.Module], schedule: Schedule) -> torch.optim.AdamW:
    flat = [p for m in modules for p in m.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in flat if p.ndim > 1], "weight_decay": schedule.decay},
        {"params": [p for p in flat if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.rate, betas=(0.9, 0.98))


def rate_at(step: int, s: Schedule) -> float:
    if step < s.warmup:
        return s.rate * (step + 1) / s.warmup
    return s.rate * 0.5 * (1 + math.cos(math.pi * (step - s.warmup) / max(1, s.steps - s.warmup)))


def loop(
    name: str,
    modules: nn.ModuleDict,
    loss_of: Callable[[torch.Generator], tuple[Tensor, float]],
    schedule: Schedule,
    state: Path,
    every: int = 1000,
) -> None:
    """Run a stage; ``state`` holds the resumable checkpoint and is removed by nobody but the user."""
    opt = optimiser(list(modules.values()), schedule)
    start = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        modules.load_state_dict(saved["modules"])
        opt.load_state_dict(saved["opt"])
        start = saved["step"]
    clock, seen = time.time(), []
    for step in range(start, schedule.steps):
        for group in opt.param_groups:
            group["lr"] = rate_at(step, schedule)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
        with torch.autocast("cpu", torch.bfloat16):
            loss, accuracy = loss_of(generator)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        opt.step()
        seen.append(accuracy)
        done = step + 1
        if done % every == 0 or done == schedule.steps:
            window = seen[-every:]
            log.info("%s step %d: loss %.3f, training accuracy %.3f, %.3f s a step",
                     name, done, loss.item(), sum(window) / len(window), (time.time() - clock) / len(seen))  # fmt: skip
            temporary = state.with_suffix(".tmp")
            torch.save({"modules": modules.state_dict(), "opt": opt.state_dict(), "step": done}, temporary)
            temporary.rename(state)


def classes(split: Split) -> int:
    return int(split[1].max()) + 1


def pretrain(work: Path) -> nn.ModuleDict:
    pools = pretraining(work)
    torch.manual_seed(0)
    width = ViTConfig().width
    modules = nn.ModuleDict({"encoder": ZooViT(), **{k: nn.Linear(width, classes(v)) for k, v in pools.items()}})
    glyph, clip = Pool(pools["glyph"]), Pool(pools["clipart"])

    def loss_of(generator: torch.Generator) -> tuple[Tensor, float]:
        gx, gy = glyph.batch(112, generator)
        cx, cy = clip.batch(16, generator)
        features = modules["encoder"](torch.cat([gx, cx]))
        logits = modules["glyph"](features[:112])
        loss = F.cross_entropy(logits, gy) + 0.1 * F.cross_entropy(modules["clipart"](features[112:]), cy)
        return loss, (logits.argmax(-1) == gy).float().mean().item()

    loop("pretrain", modules, loss_of, PRETRAIN, work / "pretrain.pt")
    return modules


def joint(work: Path) -> nn.ModuleDict:
    """Continue with a small share of every task and train the tasks' heads together with the encoder."""
    modules = pretrain(work)
    shares = {name: task_splits(work, name) for name in VIT20}
    torch.manual_seed(1)
    width = ViTConfig().width
    for name in VIT20:
        modules[f"head_{name}"] = nn.Linear(width, classes(shares[name]["test"]))
    pools = {name: Pool(tuple(a[:JOINT_SHARE] for a in shares[name]["joint"])) for name in VIT20}
    glyph = Pool(pretraining(work)["glyph"])
    each = 8

    def loss_of(generator: torch.Generator) -> tuple[Tensor, float]:
        batches = [pools[name].batch(each, generator) for name in VIT20]
        gx, gy = glyph.batch(48, generator)
        features = modules["encoder"](torch.cat([x for x, _ in batches] + [gx]))
        logits = [modules[f"head_{n}"](features[each * i : each * i + each]) for i, n in enumerate(VIT20)]
        losses = [F.cross_entropy(z, y, label_smoothing=0.05) for z, (_, y) in zip(logits, batches, strict=True)]
        hits = [(z.argmax(-1) == y).float().mean() for z, (_, y) in zip(logits, batches, strict=True)]
        extra = F.cross_entropy(modules["glyph"](features[each * len(VIT20) :]), gy)
        return torch.stack(losses).mean() + 0.3 * extra, torch.stack(hits).mean().item()

    loop("joint", modules, loss_of, JOINT, work / "joint.pt")
    return modules


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is stored: float16, so that base and experts start from exactly the same numbers."""
    return {k: v.half() for k, v in state.items()}


@functools.cache
def base_and_heads(work: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    modules = joint(work)
    heads = {name: half(modules[f"head_{name}"].state_dict()) for name in VIT20}
    return half(modules["encoder"].state_dict()), heads


def head_of(state: dict[str, Tensor]) -> nn.Linear:
    head = nn.Linear(state["weight"].shape[1], state["weight"].shape[0])
    head.load_state_dict({k: v.float() for k, v in state.items()})
    return head.requires_grad_(False)


def expert(work: Path, name: str, schedule: Schedule = EXPERT, tag: str = "experts") -> dict[str, Tensor]:
    """Fine-tune the encoder on one task behind its frozen head; cached in ``work/experts``."""
    folder = work / tag
    folder.mkdir(exist_ok=True)
    final = folder / f"{name}.final.pt"
    if not final.exists():
        base, heads = base_and_heads(work)
        encoder = ZooViT()
        encoder.load_state_dict({k: v.float() for k, v in base.items()})
        head = head_of(heads[name])
        pool = Pool(task_splits(work, name)["train"])

        def loss_of(generator: torch.Generator) -> tuple[Tensor, float]:
            x, y = pool.batch(schedule.batch, generator)
            logits = head(encoder(x))
            return F.cross_entropy(logits, y), (logits.argmax(-1) == y).float().mean().item()

        loop(f"expert {name}", nn.ModuleDict({"encoder": encoder}), loss_of, schedule, folder / f"{name}.pt", 300)
        torch.save(half(encoder.state_dict()), final)
    return torch.load(final, weights_only=True)


@torch.inference_mode()
def accuracy(state: dict[str, Tensor], head: dict[str, Tensor], split: Split) -> float:
    """Share of a split that encoder + head get right, in float32."""
    encoder = ZooViT().eval()
    encoder.load_state_dict({k: v.float() for k, v in state.items()})
    linear = head_of(head)
    images, labels = (torch.from_numpy(a) for a in split)
    hits = [
        (linear(encoder(x)).argmax(-1) == y).sum().item()
        for x, y in zip(images.split(512), labels.split(512), strict=True)
    ]
    return sum(hits) / len(labels)
