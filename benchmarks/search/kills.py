"""kill -9 at random moments, for every engine: is the resumed study the uninterrupted one, row by row?

    python benchmarks/search/kills.py                          100 kills over the installed engines
    python benchmarks/search/kills.py --kills 20 --engines botorch cma

Studies are of the cheap problem in tests/search/problem.py, each in a process of its own. A process is killed after a
random time, half of the times counted from its start (imports, opening, reading), half from a random row of the study
on (suggesting, evaluating, committing); a study that ends first is begun anew. The table grows as it goes.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bmm.records import Trial  # noqa: E402
from bmm.search.engine import ENGINES, engine_row  # noqa: E402
from tests.search import problem  # noqa: E402
from tests.search.problem import outcomes, rows_on_disk  # noqa: E402

BUDGET = 16
PAUSE = 0.05
"""Seconds an evaluation takes, so that some kills hit one."""

SLOW = {"saasbo": 4}
"""Engines that get one kill in so many of the others': a suggestion takes them many seconds."""


def start(path: Path, engine: str) -> subprocess.Popen[str]:
    command = problem.command(path, engine, BUDGET, PAUSE)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(path: Path, engine: str) -> list[Trial]:
    process = start(path, engine)
    _, errors = process.communicate()
    if process.returncode or errors:
        raise SystemExit(f"{engine}: the study failed\n{errors}")
    return rows_on_disk(path)


def kill(process: subprocess.Popen[str], path: Path, moment: random.Random, seconds: float) -> bool:
    """Kills the process at a random moment; False where it had ended by then."""
    held = len(rows_on_disk(path))
    if moment.random() < 0.5 and held < BUDGET - 1:
        target = moment.randint(held + 1, min(held + 3, BUDGET - 1))
        while process.poll() is None and len(rows_on_disk(path)) < target:
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 2 * seconds / BUDGET))
    else:
        time.sleep(moment.uniform(0, 0.5 * seconds))
    process.kill()
    process.communicate()
    return process.returncode == -9


def check(engine: str, kills: int, seed: int, folder: Path) -> tuple[int, int, int, bool]:
    """Kills that landed, how many left a trial pending, studies they were spread over, and whether all are equal."""
    moment = random.Random(f"{engine}/{seed}")
    began = time.perf_counter()
    whole = outcomes(finish(folder / "whole.db", engine))
    seconds = time.perf_counter() - began
    landed = pending = studies = 0
    equal = True
    while landed < kills:
        path = folder / f"killed{studies}.db"
        studies += 1
        while landed < kills and kill(start(path, engine), path, moment, seconds):
            landed += 1
            pending += any(row.status == "pending" for row in rows_on_disk(path))
        equal &= outcomes(finish(path, engine)) == whole
    return landed, pending, studies, equal


def shared(kills: int, engines: list[str]) -> dict[str, int]:
    """``kills`` over the engines, evenly but for the slow ones."""
    weights = {name: 1 / SLOW.get(name, 1) for name in engines}
    share = {name: int(kills * weights[name] / sum(weights.values())) for name in engines}
    for name in sorted(engines, key=lambda name: -weights[name])[: kills - sum(share.values())]:
        share[name] += 1
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--engines", nargs="+", default=[name for name, row in ENGINES.items() if row.installed])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    for name in args.engines:
        engine_row(name).require(name)
    different = False
    print("| engine | kills | left a trial pending | studies | equal in every row |")
    print("|--------|------:|---------------------:|--------:|--------------------|", flush=True)
    for name, kills in shared(args.kills, args.engines).items():
        if kills:
            with tempfile.TemporaryDirectory() as folder:
                landed, pending, studies, equal = check(name, kills, args.seed, Path(folder))
            print(f"| {name} | {landed} | {pending} | {studies} | {'yes' if equal else 'NO'} |", flush=True)
            different |= not equal
    if different:
        raise SystemExit("a resumed study differs from the uninterrupted one")


if __name__ == "__main__":
    main()
