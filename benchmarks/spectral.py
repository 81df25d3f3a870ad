"""Spectral merges of ViT-shaped experts: seconds against plain SVDs, error, and peak memory.

    python benchmarks/spectral.py            ViT-B/32 (86 M) and ViT-L/14 (304 M parameters), 8 and 20 experts
    python benchmarks/spectral.py --quick    ViT-B/32, 8 experts, one round

Every distinct shape of the model is timed once a round and counted as often as it occurs. "SVD" is the published way,
float32 SVDs of every task vector and of the stacked vectors, run in turn with ours in one process; ratios are of
medians. The error is the largest one, relative to the largest entry of the same formula by SVDs in float64. Task
vectors are random with a spectrum that falls over two decades. Memory is the growth of the process's peak during a
whole `merge_stream` of the largest module (Linux: /proc/self/status), experts made on access, divided by the size of
its T task vectors in float32. --tokens adds CLIP's token embedding, (49408, 512) or (49408, 768), to the memory column.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from bmm.anchors import Context, get, merge_stream
from bmm.report import markdown

MODELS = {  # shape -> how often it occurs in the vision tower; the last entry is the token embedding of the text tower
    "ViT-B/32": ({(768, 768): 48, (3072, 768): 12, (768, 3072): 13, (50, 768): 1, (512, 768): 1}, (49408, 512)),
    "ViT-L/14": (
        {(1024, 1024): 96, (4096, 1024): 24, (1024, 4096): 24, (1024, 588): 1, (257, 1024): 1, (768, 1024): 1},
        (49408, 768),
    ),
}
KNOBS: dict[str, dict[str, float]] = {"tsv": {}, "iso_c": {}, "iso_cts": {"common_share": 0.8}}


def task_vectors(experts: int, shape: tuple[int, int], seed: int = 0) -> Tensor:
    """(T, o, i), of full rank, with singular values falling over two decades."""
    generator = torch.Generator().manual_seed(seed)
    o, i = shape
    fall = torch.logspace(0, -2, min(shape))
    out = torch.empty(experts, o, i)
    for tau in out:
        noise = torch.randn(o, i, generator=generator)
        tau.copy_(noise * fall[:, None] if o <= i else noise * fall)
    return out * 1e-3


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(matrix, full_matrices=False)


def polar(matrix: Tensor) -> Tensor:
    p, _, qh = svd(matrix)
    return p @ qh


def by_svd(name: str, taus: Tensor) -> Tensor:
    """The three formulas of arXiv 2412.00081 and 2502.04959 with an SVD wherever they say SVD, in ``taus``' dtype."""
    m = min(taus.shape[1:])
    if name == "iso_c":
        u, s, vh = svd(taus.sum(0))
        return s.mean() * (u @ vh)
    own = m // len(taus) if name == "tsv" else min(round(0.2 * m / len(taus)), m // len(taus))
    us, ss, vs = [], [], []
    if name == "iso_cts":
        u, s, vh = svd(taus.sum(0))
        common = m - own * len(taus)
        us, ss, vs = [u[:, :common]], [s[:common]], [vh[:common]]
    for tau in taus:
        rest = tau - us[0] @ (us[0].mT @ tau) if name == "iso_cts" else tau
        u, s, vh = svd(rest)
        us, ss, vs = [*us, u[:, :own]], [*ss, s[:own]], [*vs, vh[:own]]
    scales = torch.cat(ss)
    if name == "iso_cts":
        scales = scales.mean().expand(len(scales))
    return polar(torch.cat(us, 1)) * scales @ polar(torch.cat(vs, 0))


def ours(name: str, taus: Tensor) -> Tensor:
    return get(name).kernel(taus, Context("w", taus[0], torch.ones(len(taus))), **KNOBS[name])


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def compare(name: str, shapes: Mapping[tuple[int, int], int], experts: int, rounds: int) -> tuple[float, float]:
    """Seconds of a whole model, ours and by SVD: medians a shape, times its count."""
    total = [0.0, 0.0]
    for shape, count in shapes.items():
        taus = task_vectors(experts, shape)
        pairs = [
            (seconds(lambda x=taus: ours(name, x)), seconds(lambda x=taus: by_svd(name, x))) for _ in range(rounds)
        ]
        for side in range(2):
            total[side] += count * statistics.median(pair[side] for pair in pairs)
    return total[0], total[1]


def error(name: str, experts: int, shape: tuple[int, int]) -> tuple[float, float]:
    """Largest error of ours and of float32 SVDs against float64 SVDs, relative to the largest entry."""
    taus = task_vectors(experts, shape, seed=1)
    exact = by_svd(name, taus.double())
    return tuple(float((d - exact).abs().max() / exact.abs().max()) for d in (ours(name, taus), by_svd(name, taus)))  # type: ignore[return-value]


class Made(Mapping[str, Tensor]):
    """A model of one weight that is made whenever it is read."""

    def __init__(self, shape: tuple[int, int], seed: int) -> None:
        self.shape, self.seed = shape, seed

    def __getitem__(self, name: str) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed)).mul_(1e-3)

    def __iter__(self) -> Iterator[str]:
        return iter(("layer.weight",))

    def __len__(self) -> int:
        return 1


def peak_of_merge(name: str, experts: int, o: int, i: int) -> None:
    """In a process of its own: print the growth of its peak memory over T task vectors."""

    def peak() -> int:  # not ru_maxrss, which starts at the parent's
        return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

    ours(name, task_vectors(2, (128, 128)))  # libraries load lazily
    before = peak()
    for _ in merge_stream(name, Made((o, i), 0), [Made((o, i), 1 + t) for t in range(experts)]):
        pass
    print((peak() - before) / (4 * experts * o * i))


def peak_share(name: str, experts: int, shape: tuple[int, int]) -> float:
    command = [sys.executable, __file__, "--peak", name, *map(str, (experts, *shape))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=list(KNOBS), choices=list(KNOBS))
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--experts", type=int, nargs="*", default=[8, 20])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        peak_of_merge(args.peak[0], *map(int, args.peak[1:]))
        return
    if args.quick:
        args.models, args.experts, args.rounds = ["ViT-B/32"], [8], 1
    rows = []
    for model in args.models:
        shapes, tokens = MODELS[model]
        largest = max(shapes, key=lambda s: s[0] * s[1])
        for experts in args.experts:
            for name in args.methods:
                mine, plain = compare(name, shapes, experts, args.rounds)
                off, off32 = error(name, experts, (768, 768))
                memory = f"{peak_share(name, experts, largest):.2f}"
                if args.tokens:
                    memory += f", tokens {peak_share(name, experts, tokens):.2f}"
                rows.append(
                    [name, model, str(experts), f"{mine:.1f}", f"{plain:.1f}", f"{plain / mine:.1f}", f"{off:.0e}",
                     f"{off32:.0e}", memory]
                )  # fmt: skip
                print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    header = [
        "method",
        "model",
        "T",
        "seconds",
        "SVD seconds",
        "times faster",
        "error",
        "SVD's error",
        "peak / T experts",
    ]
    print(markdown(header, rows))
    print(f"\n{args.threads} thread(s), medians of {args.rounds} interleaved round(s)")


if __name__ == "__main__":
    main()
