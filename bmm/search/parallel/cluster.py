"""Workers that are actors of a Ray cluster: the one that is running, or one started on this machine for the purpose."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from bmm.errors import StudyError
from bmm.search.executor import Evaluate, Job
from bmm.search.parallel.crew import Crew, Gone, Message, Ready, Unfit, Workplace, moved_in

_PATIENCE = 10.0  # seconds for a cluster to answer


def require_ray() -> None:
    """Raises `StudyError` where Ray is not installed; imports nothing."""
    if importlib.util.find_spec("ray") is None:
        raise StudyError("executor ray: ray is not installed", "pip install 'bmm-tuner[ray]', or executor: local")


class Host:
    """An actor: one worker's life."""

    def __init__(self) -> None:
        self._evaluate: Evaluate | None = None

    def begin(self, workplace: Workplace, place: int) -> Ready | Unfit:
        self._evaluate, word = moved_in(workplace, place)
        return word

    def run(self, job: Job) -> Any:
        assert self._evaluate is not None
        return job(self._evaluate)


@dataclass(eq=False)
class _Worker:
    actor: Any
    answer: Any  # of what it was asked last, or None where it has been heard


class Actors(Crew):
    """``size`` actors, each with the evaluation that a workplace makes in it.

    The workplace is put into Ray's object store once; NumPy arrays in it are mapped by a node's actors, not copied.

    Args:
        workplace: makes it for a number of threads: what an actor may use is known only when the cluster is.
        gpus: whether an actor needs a GPU; where there are fewer than actors, they share.

    Raises:
        StudyError: no Ray, no cluster at $RAY_ADDRESS, or one too small for the workers.
    """

    def __init__(
        self,
        workplace: Callable[[int], Workplace],
        size: int,
        notice: Callable[[str], None] = lambda text: None,
        *,
        gpus: bool = False,
    ) -> None:
        super().__init__(size, notice)
        require_ray()
        self._make, self._gpus, self._ours = workplace, gpus, False
        self._class: Any = None

    def __enter__(self) -> Actors:
        import ray

        self._ours = not ray.is_initialized()
        try:
            if self._ours:
                _join_or_start(self.size)
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            share = _cpus_each([int(n.get("CPU", 0)) for n in nodes], self.size)
            gpus = _gpus_each(sum(int(n.get("GPU", 0)) for n in nodes), self.size) if self._gpus else 0.0
            self._class = ray.remote(num_cpus=share, num_gpus=gpus, scheduling_strategy="SPREAD")(Host)
            self._workplace = ray.put(self._make(share))
            return super().__enter__()
        except BaseException:
            self._leave()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            super().__exit__()
        finally:
            self._leave()

    def _leave(self) -> None:
        if self._ours:
            import ray

            ray.shutdown()
            self._ours = False

    def _hire(self, place: int) -> _Worker:
        actor = self._class.remote()
        return _Worker(actor, actor.begin.remote(self._workplace, place))

    def _hand(self, worker: _Worker, job: Job) -> None:
        worker.answer = worker.actor.run.remote(job)

    def _listen(self, workers: dict[int, _Worker]) -> tuple[int, Message]:
        import ray

        asked = {w.answer: place for place, w in workers.items() if w.answer is not None}
        (answer,), _ = ray.wait(list(asked), num_returns=1)
        workers[asked[answer]].answer = None
        try:
            message: Message = ray.get(answer)
        except ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[:300]
            message = Gone(f"was lost ({type(error).__name__}: {reason})")
        return asked[answer], message

    def _dismiss(self, workers: Collection[_Worker], busy: Collection[_Worker]) -> None:
        import ray

        for worker in workers:
            ray.kill(worker.actor)


def _join_or_start(size: int) -> None:
    """Connects to the cluster of $RAY_ADDRESS or one that runs here; else starts one with a CPU a worker or more."""
    import ray

    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        if address not in ("auto", "local"):
            _knock(address)
        if address != "local":
            ray.init(address=address, **quiet)
            return
    except (OSError, ValueError, RuntimeError) as error:  # a ConnectionError is an OSError
        if address != "auto":
            raise StudyError(
                f"no Ray cluster at RAY_ADDRESS={address}: {error}", "start it, or unset RAY_ADDRESS for a local one"
            ) from error
    ray.init(address="local", num_cpus=max(size, os.cpu_count() or 1), include_dashboard=False, **quiet)


def _knock(address: str) -> None:
    """Raises `OSError` or `ValueError` where nobody answers at [ray://]HOST:PORT: Ray itself tries for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    socket.create_connection((host, int(port)), timeout=_PATIENCE).close()


def _cpus_each(nodes: list[int], size: int) -> int:
    """The most CPUs a worker can have when all of them are to find a place on nodes with so many."""
    for share in range(max(nodes, default=0), 0, -1):
        if sum(cpus // share for cpus in nodes) >= size:
            return share
    raise StudyError(
        f"the Ray cluster has {sum(nodes)} CPUs for {size} workers", "take fewer workers, or a larger cluster"
    )


def _gpus_each(gpus: int, size: int) -> float:
    """What a worker takes of a GPU: a whole one, or the share that lets all of them find a place."""
    if gpus == 0:
        raise StudyError("the Ray cluster has no GPU", "device: cpu, or nodes with GPUs")
    return float(Fraction(1, -(-size // gpus)))
