"""Workers that are processes of this machine.

They are spawned, not forked: a fork copies locks that threads hold, and cannot use CUDA. A worker hears nothing of
Ctrl-C (the leader does, and ends its workers) and ends by itself when the leader is gone, however that ended.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from bmm.errors import StudyError
from bmm.search.executor import Job
from bmm.search.parallel.crew import OUT_OF_MEMORY, Crew, Gone, Message, Workplace, moved_in

_PATIENCE = 5.0  # seconds for a worker's last breath
_WATCH = 0.5  # seconds between two looks whether the leader lives


@dataclass(eq=False)
class _Worker:
    process: SpawnProcess
    pipe: Connection


class Processes(Crew):
    """``size`` processes, each with the evaluation that ``workplace`` makes in it."""

    def __init__(self, workplace: Workplace, size: int, notice: Callable[[str], None] = lambda text: None) -> None:
        super().__init__(size, notice)
        self._workplace = pickle.dumps(workplace)
        self._context = multiprocessing.get_context("spawn")

    def _hire(self, place: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, self._workplace, place, os.getpid()), name=f"bmm worker {place}"
        )
        with _ctrl_c_held_back():
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def _hand(self, worker: _Worker, job: Job) -> None:
        with contextlib.suppress(OSError):  # lost: its end of the pipe is closed
            worker.pipe.send(job)

    def _listen(self, workers: dict[int, _Worker]) -> tuple[int, Message]:
        sources = {w.pipe: place for place, w in workers.items()} | {
            w.process.sentinel: place for place, w in workers.items()
        }
        place = sources[connection.wait(list(sources))[0]]  # type: ignore[index]
        worker = workers[place]
        try:
            if worker.pipe.poll():  # also what it said just before it ended
                message: Message = worker.pipe.recv()
                return place, message
        except (EOFError, OSError):
            pass
        worker.process.join(_PATIENCE)
        return place, Gone(_ending(worker.process.exitcode))

    def _dismiss(self, workers: Collection[_Worker], busy: Collection[_Worker]) -> None:
        for worker in busy:
            worker.process.kill()
        for worker in workers:
            worker.pipe.close()  # an idle worker goes home
        deadline = time.monotonic() + _PATIENCE
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()
            worker.process.close()


def _ending(code: int | None) -> str:
    if code is None:
        return "closed its pipe and went on"
    if code >= 0:
        return f"ended with exit code {code}"
    known = {s.value: s.name for s in signal.Signals} | {signal.SIGKILL.value: OUT_OF_MEMORY}
    return f"was ended by {known.get(-code, f'signal {-code}')}"


def refuse_while_imported() -> None:
    """Raises `StudyError` in a worker that imports its leader's script, where that starts workers itself."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise StudyError(
            "this script starts workers while one of them imports it",
            "call bmm.tune(workers=...) under `if __name__ == '__main__':`",
        )


@contextlib.contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Processes started inside never see SIGINT; this one sees it afterwards."""
    resource_tracker.ensure_running()  # starting it would let the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, workplace: bytes, place: int, leader: int) -> None:
    """The life of a worker."""
    threading.Thread(target=_end_with, args=(leader,), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the pipe's other end was closed: nothing more to do
        evaluate, word = moved_in(lambda place: pickle.loads(workplace)(place), place)
        pipe.send(word)
        while evaluate is not None:
            job: Job = pipe.recv()
            pipe.send(job(evaluate))


def _end_with(leader: int) -> None:
    """Ends this process when it has another parent than the one that started it."""
    while os.getppid() == leader:
        time.sleep(_WATCH)
    os._exit(1)
