"""What every set of workers does: hire them, give them jobs, hear from them, replace the lost ones.

A worker is a process that holds one evaluation for its whole life. It begins by making it (a *workplace* is the recipe
for that, picklable), says that it is ready or why it cannot be, and then answers each job with an outcome.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Self

from bmm.errors import BmmError, StudyError
from bmm.records import Trial
from bmm.search.executor import Evaluate, Executor, Finished, Job

Workplace = Callable[[int], Evaluate]
"""Makes the evaluation of worker 0, 1, ...; called in the worker."""

FALSE_STARTS = 2
"""Workers lost in succession before one was ready; more means that none ever will be."""

OUT_OF_MEMORY = "SIGKILL, as the kernel does where memory runs out"


@dataclass(frozen=True)
class Ready:
    """A worker's first word."""


@dataclass(frozen=True)
class Unfit:
    """A worker's first word where it cannot make its evaluation: an error's message and hint."""

    message: str
    hint: str


@dataclass(frozen=True)
class Gone:
    """What is said of a worker that was lost: how it ended."""

    why: str


Message = Ready | Unfit | Gone | Trial


def moved_in(workplace: Workplace, place: int) -> tuple[Evaluate | None, Ready | Unfit]:
    """What worker ``place`` has to work with, and its first word."""
    try:
        return workplace(place), Ready()
    except BmmError as error:
        return None, Unfit(error.message, error.hint)
    except Exception as error:  # whatever a user's file raises
        return None, Unfit(f"{type(error).__name__}: {error}", "see docs/parallel.md for what workers need")


class Crew(Executor):
    """Workers with places 0 to ``size`` - 1. Use it in a ``with`` block: it leaves no worker behind.

    A subclass hires, hands out, listens and dismisses; its workers may be any objects. ``notice`` is told of workers
    that were lost.
    """

    def __init__(self, size: int, notice: Callable[[str], None]) -> None:
        self.size, self._notice = size, notice
        self._workers: dict[int, Any] = {}  # by place
        self._ready: set[int] = set()
        self._jobs: dict[int, int] = {}  # place -> number of the job it is at
        self._false_starts = 0

    def __enter__(self) -> Self:
        try:
            for place in range(self.size):
                self._workers[place] = self._hire(place)
        except BaseException:
            self._dismiss_all()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._dismiss_all()

    @property
    def idle(self) -> int:
        return len(self._ready - self._jobs.keys())

    def submit(self, number: int, job: Job) -> None:
        place = min(self._ready - self._jobs.keys())
        self._jobs[place] = number
        self._hand(self._workers[place], job)

    def wait(self) -> Finished | None:
        place, message = self._listen(self._workers)
        if isinstance(message, Unfit):
            raise StudyError(f"a worker cannot start: {message.message}", message.hint)
        if isinstance(message, Ready):
            self._ready.add(place)
            self._false_starts = 0
            return None
        number = self._jobs.pop(place, None)
        if isinstance(message, Trial):
            assert number is not None
            return Finished(number, message)
        self._replace(place, message)
        return None if number is None else Finished(number, None, message.why)

    def _replace(self, place: int, gone: Gone) -> None:
        started = place in self._ready
        self._ready.discard(place)
        self._false_starts += not started
        if self._false_starts >= FALSE_STARTS:
            raise StudyError(
                f"{FALSE_STARTS} workers in succession ended before they could begin, the last one {gone.why}",
                "take fewer workers where memory is short; a script that tunes with workers does so "
                "under `if __name__ == '__main__':`",
            )
        self._notice(f"worker {place} {gone.why}; another one takes its place")
        self._dismiss([self._workers.pop(place)], busy=())
        self._workers[place] = self._hire(place)

    def _dismiss_all(self) -> None:
        places, self._ready = self._ready, set()
        workers, self._workers = self._workers, {}
        idle = places - self._jobs.keys()
        self._dismiss(list(workers.values()), busy=[w for p, w in workers.items() if p not in idle])

    @abstractmethod
    def _hire(self, place: int) -> Any:
        """Starts a worker, without waiting for it."""

    @abstractmethod
    def _hand(self, worker: Any, job: Job) -> None:
        """Sends a job. Where the worker is lost, `_listen` says so."""

    @abstractmethod
    def _listen(self, workers: dict[int, Any]) -> tuple[int, Message]:
        """Blocks until one of the workers says something or is lost: its place and the message."""

    @abstractmethod
    def _dismiss(self, workers: Collection[Any], busy: Collection[Any]) -> None:
        """Ends workers within seconds: ``busy`` ones at once, the others by their leave."""
