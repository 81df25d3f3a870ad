"""Who evaluates trials: this very process, or workers behind the same interface (`bmm.search.parallel`).

An executor is given jobs, each a function of the evaluation that a worker holds, and hands back one outcome after the
other, in whatever order they come. It knows nothing of studies, and `bmm.search.study` knows nothing of processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from bmm.records import Hyperparameters, Trial

Evaluate = Callable[[Hyperparameters], Mapping[str, float]]
Job = Callable[[Evaluate], Trial]
"""Evaluates one trial and returns it with its outcome. Where it travels it must be picklable."""

ATTEMPTS = 2
"""So many workers may be lost to one trial before it counts as failed."""


@dataclass(frozen=True)
class Finished:
    """What came of job ``number``: its ``outcome``, or None where its worker was ``lost`` to this cause meanwhile."""

    number: int
    outcome: Trial | None
    lost: str = ""


class Executor(ABC):
    """Evaluates jobs on one or more workers."""

    @property
    @abstractmethod
    def idle(self) -> int:
        """Workers that are ready and have no job."""

    @abstractmethod
    def submit(self, number: int, job: Job) -> None:
        """Gives ``job`` to an idle worker."""

    @abstractmethod
    def wait(self) -> Finished | None:
        """Blocks until a job ends, or (None) until another worker has become ready.

        Raises `StudyError` where workers cannot do their work at all.
        """


class InProcess(Executor):
    """One worker that is this process: a job runs when it is waited for, and what it raises passes through."""

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate
        self._waiting: tuple[int, Job] | None = None

    @property
    def idle(self) -> int:
        return int(self._waiting is None)

    def submit(self, number: int, job: Job) -> None:
        self._waiting = number, job

    def wait(self) -> Finished | None:
        assert self._waiting is not None
        (number, job), self._waiting = self._waiting, None
        return Finished(number, job(self._evaluate))


def work_through(
    executor: Executor,
    following: Callable[[], Trial | None],
    job: Callable[[Trial], Job],
    finish: Callable[[Trial], None],
    should_stop: Callable[[], bool] | None = None,
) -> None:
    """Keeps the workers busy with what ``following`` gives until it gives None and all of it is finished.

    ``job`` makes a pending trial's job at the moment it is handed out, ``finish`` takes each outcome. A trial whose
    worker was lost is handed out again, and finished as failed after `ATTEMPTS` times. Where ``should_stop``, asked
    before each trial, says so, no more are begun.
    """
    running: dict[int, Trial] = {}
    again: list[Trial] = []
    lost: Counter[int] = Counter()
    stopping = False
    while True:
        while executor.idle and not stopping:
            if should_stop is not None and should_stop():
                stopping = True
                break
            trial = again.pop(0) if again else following()
            if trial is None:
                break
            running[trial.number] = trial
            executor.submit(trial.number, job(trial))
        if not running and (stopping or executor.idle):
            return
        finished = executor.wait()
        if finished is None:
            continue
        trial, outcome = running.pop(finished.number), finished.outcome
        if outcome is None:
            lost[trial.number] += 1
            if lost[trial.number] < ATTEMPTS:
                again.append(trial)
                continue
            why = f"lost its worker {ATTEMPTS} times: {finished.lost}"
            outcome = replace(trial, status="failed", error=why)
        finish(outcome)
