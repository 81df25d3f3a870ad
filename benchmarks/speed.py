"""Seconds a trial: the spectral merge against a dense solve of the same modules, and the engine's suggestions.

    python benchmarks/speed.py [--threads N] [--rounds N] [--engines NAME ...] [--dimensions D ...]

The two solvers are timed in turn in one process; ratios of medians are printed. Modules have ViT-B/32 shapes and
eight experts; Grams are of random inputs of full rank. No file is read or written.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from bmm.records import Trial
from bmm.report import markdown
from bmm.search.engine import ENGINES, build_engine, engine_row
from bmm.search.space import Space
from bmm.solver import prepare

SHAPES = {"q/k/v/o 768x768": (768, 768), "fc1 3072x768": (3072, 768), "fc2 768x3072": (768, 3072)}


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def solver_rows(rounds: int) -> list[list[str]]:
    rows = []
    generator = torch.Generator().manual_seed(0)
    for name, (o, i) in SHAPES.items():
        w0 = torch.randn(o, i, generator=generator)
        experts = torch.stack([w0 + 0.02 * torch.randn(o, i, generator=generator) for _ in range(8)])
        inputs = [torch.randn(4 * i, i, generator=generator) for _ in range(8)]
        grams = [x.T @ x / len(x) for x in inputs]
        anchor = experts.mean(0)
        start = time.perf_counter()
        module = prepare(w0, experts, grams, anchor)
        prepared = time.perf_counter() - start
        pooled = torch.stack(grams).sum(0)
        weighted = torch.stack([e @ g for e, g in zip(experts, grams, strict=True)]).sum(0)
        eye = torch.eye(i)

        def dense(
            pooled: torch.Tensor = pooled, weighted: torch.Tensor = weighted, anchor: torch.Tensor = anchor,
            eye: torch.Tensor = eye,
        ) -> torch.Tensor:  # fmt: skip
            return torch.linalg.solve(pooled + eye, (weighted + anchor).T).T

        left, right = torch.randn(o, module.rank), torch.randn(module.rank, i)
        times: dict[str, list[float]] = {"merge": [], "dense": [], "product": []}
        for _ in range(rounds):
            times["merge"].append(seconds(lambda m=module: m.merge(1.0, 0.9)))
            times["dense"].append(seconds(dense))
            times["product"].append(seconds(lambda a=left, b=right: a @ b))
        m, d, p = (statistics.median(times[k]) for k in ("merge", "dense", "product"))
        rows.append([name, f"{prepared:.2f}", f"{1e3 * m:.1f}", f"{d / m:.1f}", f"{m / p:.2f}"])
    return rows


def suggestion_seconds(name: str, dimensions: int, trials: int) -> float:
    """Median seconds an engine takes for a suggestion over a study of a smooth function."""
    space = Space.for_groups([f"g{k}" for k in range(dimensions // 2)])
    engine = build_engine(name, space, 0)
    rows: list[Trial] = []
    times = []
    for number in range(trials):
        if number < 2:
            point, kind = (space.anchor() if number == 0 else space.default()), ("anchor", "default")[number]
        else:
            start = time.perf_counter()
            point, kind = space.to_hyperparameters(engine.ask(rows).point), "search"
            times.append(time.perf_counter() - start)
        unit = space.to_unit(space.point_of(point))
        value = 1 - sum((u - 0.3 - 0.03 * k) ** 2 for k, u in enumerate(unit)) / len(unit)
        rows.append(Trial(number, kind, "completed", point, {"t": float(value)}, float(value)))  # type: ignore[arg-type]
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dimensions", type=int, nargs="*", default=[12, 48], help="of the suggestions")
    parser.add_argument("--trials", type=int, default=50, help="of the study they are timed in")
    parser.add_argument("--engines", nargs="*", default=[name for name, row in ENGINES.items() if row.installed])
    args = parser.parse_args()
    for name in args.engines:
        engine_row(name).require(name)
    torch.set_num_threads(args.threads)
    if args.rounds:
        header = ["module, 8 experts", "prepare s", "merge ms", "dense solve / merge", "merge / bare product"]
        print(markdown(header, solver_rows(args.rounds)))
        print(f"\n{args.threads} threads, medians of {args.rounds} interleaved rounds\n")
    if args.engines and args.dimensions:
        taken = [[suggestion_seconds(name, d, args.trials) for d in args.dimensions] for name in args.engines]
        header = ["engine", *(f"{d} parameters, s" for d in args.dimensions)]
        print(markdown(header, [[n, *(f"{s:.3f}" for s in row)] for n, row in zip(args.engines, taken, strict=True)]))
        print(f"\nmedian seconds a suggestion, {args.trials} trials")


if __name__ == "__main__":
    main()
