"""Workplaces around the cheap problem, for processes that are to be watched, held up and killed.

As a script it runs or resumes a study with two workers: ``workplaces.py study.db engine budget folder pause``.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bmm.errors import RecipeError, StudyError
from bmm.search.database import StudyDatabase
from bmm.search.parallel.processes import Processes
from bmm.search.study import run_study
from tests.search import problem


@dataclass(frozen=True)
class Bench:
    """Evaluates the problem and leaves a line ``pid rho`` in ``folder/log`` before; rho names the point.

    ``held``: evaluating that rho lasts until ``folder/go`` exists; ``lethal``: it kills the worker.
    """

    folder: Path
    pause: float = 0.0
    held: float | None = None
    lethal: float | None = None

    def __call__(self, place):
        def evaluate(hyperparameters):
            rho = name(hyperparameters)
            with open(self.folder / "log", "a") as log:
                log.write(f"{os.getpid()} {rho!r}\n")
            if rho == self.lethal:
                os.kill(os.getpid(), signal.SIGKILL)
            while rho == self.held and not (self.folder / "go").exists():
                time.sleep(0.01)
            time.sleep(self.pause)
            return problem.evaluate(hyperparameters)

        return evaluate


def name(hyperparameters):
    """The first group's lam and rho make a point's name: one number, another one for every point of a study."""
    lam, rho = (next(iter(v.values())) for v in (hyperparameters.lam, hyperparameters.rho))
    return rho + 1e-3 * min(lam, 1e9)


def broken(place):
    raise RecipeError("the tasks are gone", "put them back")


def stillborn(place):
    os._exit(3)


def seen(folder):
    """(pid, name) of every evaluation begun."""
    log = folder / "log"
    return [(int(pid), float(rho)) for pid, rho in map(str.split, log.read_text().splitlines())] if log.exists() else []


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def main(path, engine, budget, folder, pause):
    try:
        database = StudyDatabase.create(path, {"recipe": {"anchor": "problem"}})
    except StudyError:
        database = StudyDatabase.open(path)
    with database, Processes(Bench(folder, pause), 2) as crew:
        run_study(database, problem.SPACE, crew, reference=problem.REFERENCE, budget=budget, seed=9, engine=engine)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), float(sys.argv[5]))
