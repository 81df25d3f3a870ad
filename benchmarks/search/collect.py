"""Measures the validation scores of many points of a real study: the table that `race.py` makes its problems of.

    python benchmarks/search/collect.py                                    vit8, a pair a role: 18 parameters
    python benchmarks/search/collect.py --zoo vit20 --groups bands --bands 2

A third of the points is spread over the whole box, a sixth lies around the default, and half are mutations and
crossovers of the best so far, so that the table is dense where searches end. Goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import qmc
from studied import run_of

from bmm.search.space import Space
from bmm.tuning import search_space

ELITE = 24


def next_point(number: int, seed: int, space: Space, units: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Point ``number`` of the table, in the unit cube: ``(d,)``; ``units`` and ``values`` are the points before it."""
    generator = np.random.default_rng([seed, number])
    default = space.to_unit(space.point_of(space.default()))
    if number == 0:
        return space.to_unit(space.point_of(space.anchor()))
    if number == 1:
        return default
    if number % 3 == 0 or len(values) < ELITE:
        sequence = qmc.Sobol(len(space), scramble=True, seed=seed)
        return sequence.fast_forward(number // 3 + 1).random(1)[0]
    if number % 6 == 1:
        return np.clip(default + generator.choice([0.1, 0.2, 0.35]) * generator.standard_normal(len(space)), 0, 1)
    best = np.argsort(-values)[:ELITE]
    one, other = units[generator.choice(best, 2, replace=False)]
    child = np.where(generator.random(len(space)) < 0.3, other, one)
    moved = generator.random(len(space)) < 0.5
    return np.clip(child + moved * generator.choice([0.03, 0.1, 0.2]) * generator.standard_normal(len(space)), 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", default="vit8")
    parser.add_argument("--anchor", default="tsv")
    parser.add_argument("--grams", default="hybrid")
    parser.add_argument("--groups", default="role")
    parser.add_argument("--bands", type=int, default=4)
    parser.add_argument("--points", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = run_of(args.zoo, anchor=args.anchor, grams=args.grams, groups=args.groups, bands=args.bands)
    reference = np.array([s.value for s in run.score_experts("validation")])  # (T,)
    counts = np.array([s.n for s in run.score_experts("validation")])  # (T,)
    prepared = run.prepare()
    space = search_space(run, prepared.groups)
    out = args.out or Path(__file__).parent / "tables" / f"{args.zoo}-{args.groups}.npz"
    out.parent.mkdir(parents=True, exist_ok=True)
    units, scores = np.zeros((0, len(space))), np.zeros((0, len(reference)))
    if out.exists():
        with np.load(out) as found:
            units, scores = found["units"].astype(float), found["scores"].astype(float)
    print(f"{len(space)} parameters: {', '.join(p.name for p in space.parameters)}", flush=True)
    started = time.perf_counter()
    for number in range(len(units), args.points):
        unit = next_point(number, args.seed, space, units, (scores / reference).mean(1))
        # float32, as the table stores it: a continued run draws the same points as one that was never stopped
        unit = unit.astype(np.float32).astype(float)
        found = run.score(prepared.merge(space.to_hyperparameters(space.from_unit(unit))), "validation")
        units = np.vstack([units, unit])
        scores = np.vstack([scores, np.float32([s.value for s in found]).astype(float)])
        if number % 50 == 49 or number == args.points - 1:
            temporary = out.with_suffix(".tmp.npz")
            np.savez_compressed(
                temporary,
                units=units.astype(np.float32),
                scores=scores.astype(np.float32),
                reference=reference,
                counts=counts,
                parameters=[p.name for p in space.parameters],
                lows=[p.low for p in space.parameters],
                highs=[p.high for p in space.parameters],
                defaults=[p.default for p in space.parameters],
            )
            temporary.replace(out)
            best = (scores / reference).mean(1).max()
            seconds = time.perf_counter() - started
            print(f"{number + 1} points, best {best:.4f}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
