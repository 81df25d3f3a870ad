"""BMM beside fusion_bench's RegMean at ViT-B/32 size: collecting Grams, and one more merge once they are there.

    python benchmarks/regmean.py --into docs/speed.md       8 experts, 32 images each (9 GB of disk, 15 of memory)
    python benchmarks/regmean.py --quick                    two layers, 2 experts

transformers' CLIP vision model with random weights, experts a random step away, random images. Both tools have the same
weights, images, batches and modules: the Linear layers of all blocks. Each side is a process of its own, so that its
peak memory is its own; the two are told in turn what to do next, so that whatever else the machine does meets both.
fusion_bench's part is its own code, `RegMeanAlgorithmForCLIP.get_regmean_weights` and `merging_with_regmean_weights`,
in an environment of its own under runs/envs; ours is `bmm.grams.collect`, the cache on disk, `prepare_model` and
`PreparedModel.merge`. The merges have the same Grams, ours (without the inputs that biases read).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

SIDES = ("bmm", "fusion_bench")
PRODUCTS = 10
"""Merges after which their matrix products are timed alone."""

LINEAR = (".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj", ".self_attn.out_proj", ".mlp.fc1", ".mlp.fc2")


class Setting:
    """What both sides are given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        given = json.loads((folder / "setting.json").read_text())
        self.layers, self.experts, self.images, self.batch = (
            given[k] for k in ("layers", "experts", "images", "batch")
        )

    def model(self) -> Any:
        import torch
        from transformers import CLIPVisionConfig, CLIPVisionModel

        torch.manual_seed(0)
        return CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=self.layers, patch_size=32)).eval()

    def expert(self, model: Any, t: int) -> None:
        """Have the base's model be expert t, by steps of a tenth of the weights' size."""
        import torch

        generator = torch.Generator().manual_seed(1000 + t)
        with torch.no_grad():
            for weight in model.parameters():
                step = torch.randn(weight.shape, generator=generator)
                weight += 0.1 * weight.std().nan_to_num() * step

    def pictures(self, t: int) -> Any:
        import torch

        return torch.randn(self.images, 3, 224, 224, generator=torch.Generator().manual_seed(t))


def modules(model: Any) -> list[str]:
    """The Linear layers of the blocks."""
    return [name for name, _ in model.named_modules() if name.endswith(LINEAR)]


class Clock:
    """Seconds since it was made, and those of them that this process was computing."""

    def __init__(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def read(self, name: str = "") -> dict[str, float]:
        return {f"{name}s": time.perf_counter() - self.start[0], f"{name}cpu": time.process_time() - self.start[1]}


def peak() -> float:
    """Peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# -- one side, in a process of its own: `step` is called with the number of the expert or of the round ---------------


class OursCollecting:
    """`bmm.grams.collect`, and the cache on disk."""

    def __init__(self, setting: Setting) -> None:
        from bmm.grams import GramStore

        self.setting, self.store = setting, GramStore(setting.folder / "grams")
        setting.model()

    def step(self, t: int) -> dict[str, float]:
        from bmm.grams import collect

        model, pictures = self.setting.model(), self.setting.pictures(t)
        self.setting.expert(model, t)
        names = [f"{m}.{kind}" for m in modules(model) for kind in ("weight", "bias")]
        before = peak()
        clock = Clock()
        found = collect(model, lambda m, x: m(pixel_values=x), pictures.split(self.setting.batch), names=names)
        taken, grown = clock.read(), peak() - before
        self.store.save(f"e{t}", found)
        return taken | clock.read("kept_") | {"bytes": found.bytes, "grown": grown}


class TheirsCollecting:
    """`get_regmean_weights`; all experts' Grams are held, as their `run` does."""

    def __init__(self, setting: Setting) -> None:
        from fusion_bench.method.regmean.clip_regmean import RegMeanAlgorithmForCLIP

        class Algorithm(RegMeanAlgorithmForCLIP):
            """Its own collecting, without the model hub and the accelerator around it."""

            clip_processor = None
            fabric = SimpleNamespace(setup_dataloaders=lambda x: x, setup=lambda x: x)

            def compute_logits(self, module: Any, batch: Any, task: str) -> Any:
                return module(pixel_values=batch[0])

        self.setting, self.held = setting, list[Any]()
        self.algorithm = object.__new__(Algorithm)
        self.algorithm.num_regmean_examples = setting.images
        self.algorithm.dataloader_kwargs = {"batch_size": setting.batch}

    def step(self, t: int) -> dict[str, float]:
        import torch

        model, pictures = self.setting.model(), self.setting.pictures(t)
        self.setting.expert(model, t)
        linear = {name: module for name, module in model.named_modules() if name in set(modules(model))}
        data = [(picture, 0) for picture in pictures]
        before = peak()
        clock = Clock()
        with torch.no_grad():
            found = self.algorithm.get_regmean_weights(f"e{t}", model, data, linear)
        taken = clock.read() | clock.read("kept_")
        self.held.append(found)
        held = sum(g.numel() * g.element_size() for g in found.values())
        return taken | {"bytes": held, "grown": peak() - before}


def state_of(setting: Setting, t: int | None) -> Any:
    model = setting.model()
    if t is not None:
        setting.expert(model, t)
    return dict(model.state_dict())


class OursMerging:
    """A prepared model; a step is one trial's merge, and the products of its modules alone."""

    def __init__(self, setting: Setting) -> None:
        import torch

        from bmm import anchors
        from bmm.checkpoint import ModelPool
        from bmm.grams import GramStore
        from bmm.merging import prepare_model

        base = state_of(setting, None)
        experts = [state_of(setting, t) for t in range(setting.experts)]
        store = GramStore(setting.folder / "grams")
        grams = [store.load(f"e{t}") for t in range(setting.experts)]
        assert all(grams), "Grams are collected first"
        anchor = anchors.merge("task_arithmetic", base, experts)
        clock = Clock()
        self.model = prepare_model(ModelPool(base, experts), anchor, [g for g in grams if g])
        self.prepared = clock.read("prepared_")
        shapes = {(slot.prepared.w0.shape[0], *slot.prepared.basis.shape) for slot in self.model.slots}
        self.factors = {(o, r, i): (torch.randn(o, r), torch.randn(i, r).mT) for o, r, i in shapes}

    def step(self, number: int) -> dict[str, float]:
        import torch

        from bmm.linalg import product
        from bmm.records import Hyperparameters

        lam = 10 ** (-2 + 4 * torch.rand(1, generator=torch.Generator().manual_seed(number)).item())
        point = Hyperparameters.uniform(self.model.groups, lam, 0.9)
        clock = Clock()
        self.model.merge(point)
        taken = clock.read()
        if number >= PRODUCTS:
            return taken | self.prepared
        shapes = [(slot.prepared.w0.shape[0], *slot.prepared.basis.shape) for slot in self.model.slots]
        pairs = [self.factors[shape] for shape in shapes]
        clock = Clock()
        for left, right in pairs:
            left @ right
        taken |= clock.read("products_")
        clock = Clock()
        for left, right in pairs:
            product(left, right)
        return taken | clock.read("own_products_") | self.prepared


class TheirsMerging:
    """`merging_with_regmean_weights` of the same modules."""

    def __init__(self, setting: Setting) -> None:
        from bmm.grams import GramStore

        names = modules(setting.model())
        store = GramStore(setting.folder / "grams")
        experts = [state_of(setting, t) for t in range(setting.experts)]
        self.parameters = {f"{name}.weight": [e[f"{name}.weight"] for e in experts] for name in names}
        self.grams: list[dict[str, Any]] = []
        for t in range(setting.experts):
            found = store.load(f"e{t}")
            assert found is not None, "Grams are collected first"
            made = {key: gram[:-1, :-1].float() for key, gram in found.grams.items()}
            self.grams.append({name: made[found.key_of[f"{name}.weight"]] for name in names})

    def step(self, number: int) -> dict[str, float]:
        from fusion_bench.method.regmean.regmean import merging_with_regmean_weights

        clock = Clock()
        merging_with_regmean_weights(self.parameters, self.grams, reduce_non_diagonal_ratio=0.9 + 0.01 * number)
        return clock.read()


STAGES = {
    "collect": {"bmm": OursCollecting, "fusion_bench": TheirsCollecting},
    "merge": {"bmm": OursMerging, "fusion_bench": TheirsMerging},
}


def child(stage: str, side: str, folder: Path) -> None:
    """Make the side ready, then a step for every line of standard input; an answer is a line of JSON."""
    import torch

    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    worker: Any = STAGES[stage][side](Setting(folder))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.step(int(line)) | {"peak": peak()}), file=answers, flush=True)


# -- the parent ------------------------------------------------------------------------------------------------------


class Side:
    """One child process."""

    def __init__(self, stage: str, side: str, folder: Path, python: Path) -> None:
        environ = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
        command = [str(python), __file__, "--child", stage, side, "--work", str(folder)]
        self.log = open(folder / f"{stage}-{side}.log", "w")  # noqa: SIM115 - closed in `end`
        self.process = subprocess.Popen(
            command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.name = f"{stage} {side}"

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} failed: see {self.log.name}")
        return dict(json.loads(line))

    def step(self, number: int) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def both(
    stage: str, folder: Path, pythons: dict[str, Path], steps: dict[str, int]
) -> dict[str, list[dict[str, float]]]:
    """Each side's answers; a side with fewer steps takes its turns spread over the other's."""
    sides = {}
    for name in SIDES:  # made ready one after the other
        sides[name] = Side(stage, name, folder, pythons[name])
        sides[name].answer()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    most = max(steps.values())
    for turn in range(most):
        for name in SIDES:
            if turn * steps[name] // most >= len(found[name]):
                found[name].append(sides[name].step(len(found[name])))
                print(stage, name, found[name][-1], file=sys.stderr, flush=True)
    for side in sides.values():
        side.end()
    return found


def median(answers: list[dict[str, float]], key: str) -> float:
    return statistics.median(answer[key] for answer in answers)


def report(collected: dict[str, Any], merged: dict[str, Any], args: argparse.Namespace) -> str:
    from bmm.report import markdown

    (ours, theirs), (mine, other) = ([stage[side] for side in SIDES] for stage in (collected, merged))
    rows = []

    def row(what: str, a: float, b: float, digits: int, faster: bool = False) -> None:
        ratio = f"{b / a:.{2 if b < 10 * a else 1}f} times faster" if faster else f"{a / b:.2f} of it"
        rows.append([what, f"{a:.{digits}f}", f"{b:.{digits}f}", ratio])

    for key, unit in (("cpu", "CPU s"), ("s", "s")):
        row(f"collect an expert's Grams, {unit}", median(ours, key), median(theirs, key), 1, faster=True)
    row("the same and write the cache, s", median(ours, "kept_s"), median(theirs, "kept_s"), 1, faster=True)
    one, all_ours, all_theirs = (
        x / 2**20 for x in (theirs[0]["bytes"], ours[0]["bytes"], sum(a["bytes"] for a in theirs))
    )
    row("Grams of one expert, MiB", all_ours, one, 0)
    row(f"Grams held after {args.experts} experts, MiB", all_ours, all_theirs, 0)
    row("peak of the collecting process, MiB", ours[-1]["peak"], theirs[-1]["peak"], 0)
    for key, unit in (("cpu", "CPU s"), ("s", "s")):
        row(f"one more merge, {unit}", median(mine, key), median(other, key), 2, faster=True)
    for key, what in (("own_products_cpu", "the same way"), ("products_cpu", "by torch's matmul")):
        alone = median(mine[:PRODUCTS], key)
        times = f"the merge takes {median(mine, 'cpu') / alone:.2f} times that"
        rows.append([f"its matrix products {what}, CPU s", f"{alone:.2f}", "", times])
    count, solve = len(mine), median(other, "cpu")
    rows.append(["prepare, CPU s", f"{mine[0]['prepared_cpu']:.0f}", "", ""])
    total = mine[0]["prepared_cpu"] + sum(answer["cpu"] for answer in mine)
    row(f"prepare and {count} merges, CPU s", total, count * solve, 0, faster=True)
    row("peak of the merging process, MiB", mine[-1]["peak"], other[-1]["peak"], 0)
    title = (
        f"{args.layers} blocks, {args.experts} experts, {args.images} images each in batches of {args.batch}, "
        f"one thread; medians of {len(other)} solves by fusion_bench and {count} merges, taken in turn.\n\n"
    )
    return title + markdown(["", "bmm", "fusion_bench", ""], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--images", type=int, default=32, help="of every expert")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--solves", type=int, default=3, help="merges by fusion_bench")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/regmean"))
    parser.add_argument("--into", type=Path, help="page between whose lines <!-- regmean --> the table goes")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child, args.work)
        return
    from environments import environment
    from zoo import publish

    if args.quick:
        args.layers, args.experts, args.images, args.batch, args.trials, args.solves = 2, 2, 16, 8, 5, 2
    setting = json.dumps({key: getattr(args, key) for key in ("layers", "experts", "images", "batch")})
    there, done = args.work / "setting.json", args.work / "collected.json"
    if not there.exists() or there.read_text() != setting:
        shutil.rmtree(args.work, ignore_errors=True)
        args.work.mkdir(parents=True)
        there.write_text(setting)
    pythons = {"bmm": Path(sys.executable), "fusion_bench": environment("fusion_bench")}
    if not done.exists():  # Grams and timings are kept until the merges have been timed too
        done.write_text(json.dumps(both("collect", args.work, pythons, dict.fromkeys(SIDES, args.experts))))
    collected = json.loads(done.read_text())
    merged = both("merge", args.work, pythons, {"bmm": args.trials, "fusion_bench": args.solves})
    shutil.rmtree(args.work)
    publish(args, "regmean", report(collected, merged, args))


if __name__ == "__main__":
    main()
