"""Merges at real size, from disk to disk: CPU seconds and peak memory against parameters and experts, extrapolated.

    python benchmarks/large.py                     about 1 B parameters, 3 experts (8 GB of disk, half an hour)
    python benchmarks/large.py --quick             a tenth of that
    python benchmarks/large.py --print --into docs/large.md

Llama-shaped random checkpoints in bfloat16. Each merge is a process of its own, started as a user starts it. "linear"
repeats task arithmetic with fewer layers and with fewer experts. Finished measurements are files in --work and are not
run again. Side by side with mergekit: `benchmarks/merges.py` with the same sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from merges import checkpoints, measure
from zoo import publish

from bmm.report import markdown

KINDS = {
    "task_arithmetic": ["--anchor", "task_arithmetic", "--knob", "scale=0.4"],
    "ties": ["--anchor", "ties", "--knob", "density=0.3"],
    "BMM(task_arithmetic), data-free": [
        "--anchor", "task_arithmetic", "--knob", "scale=0.4", "--grams", "datafree", "--lam", "1",
    ],
}  # fmt: skip
TARGETS = {  # layers, hidden, intermediate, vocabulary, key/value width
    "7 B x 3": (32, 4096, 11008, 32000, 4096),
    "70 B x 3": (80, 8192, 28672, 128256, 1024),
}


def matrices(layers: int, hidden: int, intermediate: int, vocabulary: int, narrow: int) -> list[tuple[int, int, int]]:
    """(count, outputs, inputs) of the matrices that BMM solves: all of them but the embedding."""
    return [
        (2 * layers, hidden, hidden),
        (2 * layers, narrow, hidden),
        (2 * layers, intermediate, hidden),
        (layers, hidden, intermediate),
        (1, vocabulary, hidden),
    ]


def work(shapes: list[tuple[int, int, int]], experts: int) -> float:
    """Floating-point operations of a data-free BMM merge: T Grams and T products, one factor, two triangular solves."""
    return sum(n * ((4 * experts + 2) * o * i * i + i**3 / 3) for n, o, i in shapes)


def size(shapes: list[tuple[int, int, int]]) -> float:
    """Parameters, the embedding (as large as the last matrix) included."""
    return sum(n * o * i for n, o, i in shapes) + shapes[-1][1] * shapes[-1][2]


def peak(shapes: list[tuple[int, int, int]]) -> float:
    """Bytes of a module's matrices in float64: seven of (o, i), four of (i, i); see bmm/streamed.py."""
    return max(8 * (7 * o * i + 4 * i * i) for _, o, i in shapes)


def run(args: argparse.Namespace, kind: str, layers: int, experts: int) -> dict[str, Any] | None:
    """One measurement, from its file if it is there."""
    sizes = (args.experts, layers, args.hidden, args.intermediate, args.vocabulary)
    name = f"{kind.split('(')[0].lower()}-{layers}-{args.hidden}-{experts}-{args.threads}"
    file = args.work / f"large-{name}.json"
    if not file.exists():
        if args.print:
            return None
        root = args.work / "-".join(map(str, sizes))
        parameters, out = checkpoints(root, *sizes), root / f"out-{os.getpid()}"
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-c", "from bmm_cli.main import main; main()", "merge", "--out", str(out), "--quiet"]
        command += ["--base", str(root / "base"), *KINDS[kind]]
        for t in range(experts):
            command += ["--expert", str(root / f"e{t + 1}")]
        environ = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        seconds, processor, mebibytes = measure(command, dict(environ), out)
        shutil.rmtree(out)
        found = {"parameters": parameters, "experts": experts, "seconds": seconds, "cpu": processor, "mib": mebibytes}
        args.work.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
        print(name, found, flush=True)
    loaded: dict[str, Any] = json.loads(file.read_text())
    return loaded


def draw(path: Path, points: list[tuple[str, float, float]]) -> None:
    """CPU seconds against GB read and written, with the straight line through them."""
    import matplotlib
    import numpy as np

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "bmm"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(4.6, 3.2), layout="constrained")
    x, y = np.array([p[1] for p in points]), np.array([p[2] for p in points])
    slope, start = np.polyfit(x, y, 1)
    axis.plot([0, x.max()], [start, start + slope * x.max()], color="0.7")
    for label, gigabytes, seconds in points:
        axis.plot(gigabytes, seconds, "o", label=label)
    axis.set(xlabel="GB read and written", ylabel="CPU seconds", xlim=(0, None), ylim=(0, None))
    axis.set_title(f"task arithmetic: {start:.1f} s + {slope:.2f} s a GB", fontsize="medium")
    axis.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/merges"))
    parser.add_argument("--svg", type=Path, default=Path("docs/pictures/large.svg"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--print", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--into", type=Path, help="a Markdown file whose marked place takes the result")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.hidden, args.intermediate, args.vocabulary = 8, 1024, 2816, 8000
    own = (args.layers, args.hidden, args.intermediate, args.vocabulary, args.hidden)
    rows, extrapolated = [], []
    for kind in KINDS:
        found = run(args, kind, args.layers, args.experts)
        if found is None:
            continue
        rows.append(
            [kind, f"{found['parameters'] / 1e9:.2f} B x {found['experts']}", f"{found['seconds']:.0f}",
             f"{found['cpu']:.0f}", f"{found['mib'] / 1024:.2f}"]
        )  # fmt: skip
        read = 2 * found["parameters"] * (found["experts"] + 2) / 1e9  # GB in bfloat16: base, experts, result
        for target, shape in TARGETS.items():
            there = matrices(*shape)
            gigabytes = 2 * size(there) * 5 / 1e9
            if kind.startswith("BMM"):
                rate = work(matrices(*own), args.experts) / found["cpu"]
                hours = work(there, 3) / rate / 3600
                text = f"{work(there, 3):.2g} float64 operations at {rate / 1e9:.0f} G a second and core, as measured"
                memory = f"{peak(there) / 2**30:.0f} GiB (largest module)"
            else:
                hours = gigabytes * found["cpu"] / read / 3600
                text = f"{gigabytes:.0f} GB read and written at {read / found['cpu']:.2f} GB a CPU second, as measured"
                memory = f"{found['mib'] / 1024:.1f} GiB (pieces)"
            extrapolated.append([kind, target, f"{hours:.2f}", memory, text])
    linear, points = [], list[tuple[str, float, float]]()
    fewer = [(args.layers // 4, args.experts), (args.layers // 2, args.experts)]
    for layers, experts in (*fewer, *((args.layers, t) for t in range(1, args.experts + 1))):
        if found := run(args, "task_arithmetic", layers, experts):
            gigabytes = 2 * found["parameters"] * (experts + 2) / 1e9
            points.append((f"{layers} layers, {experts} experts", gigabytes, found["cpu"]))
            linear.append(
                [
                    str(layers),
                    str(experts),
                    f"{gigabytes:.1f}",
                    f"{found['cpu']:.1f}",
                    f"{found['cpu'] / gigabytes:.2f}",
                ]
            )
    text = markdown(["merge", "size", "seconds", "CPU seconds", "peak GiB"], rows)
    text += "\n\nTask arithmetic, fewer layers and experts:\n\n"
    text += markdown(["layers", "experts", "GB read and written", "CPU seconds", "CPU seconds a GB"], linear)
    text += "\n\nExtrapolated, not measured:\n\n"
    text += markdown(["merge", "size", "core hours", "peak", "how"], extrapolated)
    publish(args, "large", text)
    if len(points) > 1:
        draw(args.svg, points)


if __name__ == "__main__":
    main()
