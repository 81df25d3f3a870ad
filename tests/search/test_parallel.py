"""Studies with workers: real processes on a cheap problem, in any order, killed and interrupted."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from bmm.errors import StudyError
from bmm.search.database import StudyDatabase
from bmm.search.parallel.processes import Processes
from bmm.search.study import best, run_study
from tests.search import problem, workplaces
from tests.search.problem import REFERENCE, SPACE, outcomes, rows_on_disk
from tests.search.workplaces import Bench, alive, name, seen

ROOT = Path(__file__).parents[2]
PLAIN = {"reference": REFERENCE, "budget": 10, "seed": 9, "engine": "sobol"}  # trial 5 fails


def study(path, evaluate=problem.evaluate, **changes):
    database = StudyDatabase.open(path) if path.exists() else StudyDatabase.create(path, {})
    with database:
        return run_study(database, SPACE, evaluate, **{**PLAIN, **changes})


def staffed(path, workplace, size=2, notice=lambda text: None, **changes):
    with Processes(workplace, size, notice) as crew:
        return study(path, crew, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The study without workers. Quasi-random suggestions do not depend on the rows: any order gives the same ones."""
    return study(tmp_path_factory.mktemp("whole") / "study.db")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study.db"


def test_workers_do_what_one_process_does_each_trial_once(tmp_path, path, whole):
    finished, sizes = [], set()

    def on_trial(trial, leader):
        rows = rows_on_disk(path)
        finished.append((trial.number, leader))
        sizes.add(sum(row.status == "pending" for row in rows))  # committed before they are evaluated
        assert rows[trial.number] == trial  # and after
        assert leader == best(rows) if any(r.status == "completed" for r in rows) else leader is None

    trials = staffed(path, Bench(tmp_path, 0.02), on_trial=on_trial)
    assert trials == rows_on_disk(path)
    assert outcomes(trials) == outcomes(whole)
    assert {t.status for t in trials} == {"completed", "failed"}  # an error of an evaluation costs no worker
    assert sorted(number for number, _ in finished) == list(range(10))
    assert Counter(rho for _, rho in seen(tmp_path)) == Counter(name(t.hyperparameters) for t in whole)
    assert max(sizes) == 1  # the other worker's, whenever one is done
    workers = {pid for pid, _ in seen(tmp_path)}
    assert len(workers) == 2
    assert os.getpid() not in workers
    assert not any(map(alive, workers))


def test_results_arrive_in_any_order(tmp_path, path, whole):
    order = []

    def on_trial(trial, leader):
        order.append(trial.number)
        if len(order) == 5:
            (tmp_path / "go").touch()

    trials = staffed(path, Bench(tmp_path, held=name(SPACE.anchor())), on_trial=on_trial)
    assert order[:5] == [1, 2, 3, 4, 5]
    assert outcomes(trials) == outcomes(whole)


def test_a_worker_that_is_killed_costs_no_trial(tmp_path, path, whole):
    held, notices = name(whole[4].hyperparameters), []

    def on_trial(trial, leader):
        if trial.number == 7:
            (victim,) = (pid for pid, rho in seen(tmp_path) if rho == held)
            os.kill(victim, signal.SIGKILL)
            (tmp_path / "go").touch()

    trials = staffed(path, Bench(tmp_path, held=held), notice=notices.append, on_trial=on_trial)
    assert outcomes(trials) == outcomes(whole)
    times = Counter(rho for _, rho in seen(tmp_path))
    assert {rho for rho in times if times[rho] > 1} == {held}
    assert times[held] == 2
    assert [text.split(" ", 2)[2] for text in notices] == [
        "was ended by SIGKILL, as the kernel does where memory runs out; another one takes its place"
    ]
    assert not any(alive(pid) for pid, _ in seen(tmp_path))


def test_a_trial_that_kills_its_workers_fails_and_the_others_do_not(tmp_path, path, whole):
    lethal = name(whole[3].hyperparameters)
    trials = staffed(path, Bench(tmp_path, lethal=lethal))
    assert trials[3].status == "failed"
    assert trials[3].error.startswith("lost its worker 2 times: was ended by SIGKILL")
    assert sum(rho == lethal for _, rho in seen(tmp_path)) == 2
    rest = [o for o in outcomes(trials) if o[0] != 3]
    assert rest == [o for o in outcomes(whole) if o[0] != 3]


def test_one_worker_equals_no_worker_with_stopped_trials_too(tmp_path, path):
    chosen = {"early_stopping": 0.4, "budget": 16}
    trials = staffed(path, Bench(tmp_path), size=1, **chosen)
    assert outcomes(trials) == outcomes(study(tmp_path / "whole.db", **chosen))
    assert any(t.status == "stopped" for t in trials)


def test_should_stop_lets_running_trials_end(tmp_path, path, whole):
    count = []
    trials = staffed(
        path, Bench(tmp_path, 0.05), on_trial=lambda t, b: count.append(t), should_stop=lambda: len(count) > 3
    )
    assert 4 <= len(trials) <= 6
    assert "pending" not in {t.status for t in trials}
    assert outcomes(staffed(path, Bench(tmp_path))) == outcomes(whole)


def test_workers_that_cannot_begin_end_the_study_with_the_reason(tmp_path, path):
    with pytest.raises(StudyError, match="a worker cannot start: the tasks are gone") as caught:
        staffed(path, workplaces.broken)
    assert caught.value.hint == "put them back"
    with pytest.raises(StudyError, match=r"2 workers in succession ended .* exit code 3"):
        staffed(path, workplaces.stillborn)
    assert rows_on_disk(path) == []


def start(path, budget, folder, pause):
    command = [sys.executable, "-m", "tests.search.workplaces", path, "sobol", budget, folder, pause]
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
    )  # fmt: skip


def until(process, condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def dead_within(seconds, pids):
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_leaves_rows_pending_and_no_worker(tmp_path, path, whole):
    process = start(path, 10, tmp_path, 0.4)
    until(process, lambda: len(seen(tmp_path)) >= 4)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to workers too
    _, errors = process.communicate(timeout=10)
    assert errors.count("Traceback") == 1  # the leader's own, which the command line turns into a hint
    assert errors.rstrip().endswith("KeyboardInterrupt")
    dead_within(1, {pid for pid, _ in seen(tmp_path)})
    interrupted = rows_on_disk(path)
    assert 1 <= sum(row.status == "pending" for row in interrupted) <= 2
    assert outcomes(staffed(path, Bench(tmp_path))) == outcomes(whole)


def test_a_killed_leader_leaves_no_worker_and_loses_no_trial(tmp_path, path, whole):
    process = start(path, 10, tmp_path, 0.25)
    until(process, lambda: sum(row.status != "pending" for row in rows_on_disk(path)) >= 4)
    process.kill()
    process.communicate()  # which waits for the workers too: they hold its outputs
    dead_within(1, {pid for pid, _ in seen(tmp_path)})
    before = rows_on_disk(path)
    waiting = [row.number for row in before if row.status == "pending"]
    assert waiting
    done = []
    trials = staffed(path, Bench(tmp_path), on_trial=lambda trial, leader: done.append(trial.number))
    assert outcomes(trials) == outcomes(whole)
    assert sorted(done) == sorted(waiting) + list(range(len(before), 10))  # each once, and no finished one again
    assert [t for t in trials if t.number not in done] == [row for row in before if row.status != "pending"]
