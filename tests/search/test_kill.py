"""kill -9 at random moments: a resumed study equals the uninterrupted one in every row."""

import random
import subprocess
import time
from pathlib import Path

import pytest

from bmm.search.database import StudyDatabase
from bmm.search.engine import ENGINES
from tests.search import problem
from tests.search.problem import rows_on_disk

ROOT = Path(__file__).parents[2]


def start(path, engine, budget, pause):
    command = problem.command(path, engine, budget, pause)
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(path, engine, budget):
    process = start(path, engine, budget, 0)
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")
    with StudyDatabase.open(path, readonly=True) as database:
        return database.trials(), database.notices()


def kill(process):
    process.kill()
    process.communicate()
    return process.returncode == -9


@pytest.mark.slow
def test_twenty_two_kills_of_a_sobol_study(tmp_path):
    budget, random_moment = 60, random.Random(11)
    whole, _ = finish(tmp_path / "whole.db", "sobol", budget)
    assert len(whole) == budget
    assert {t.status for t in whole} == {"completed", "failed"}
    path, kills, pending = tmp_path / "killed.db", 0, 0
    for attempt in range(22):
        process = start(path, "sobol", budget, 0.03)
        if attempt % 5 == 0:  # also while it imports, creates the file or reads it
            time.sleep(random_moment.uniform(0, 1.5))
        else:
            assert process.stdout.readline() == "evaluating\n"
            time.sleep(random_moment.uniform(0, 0.05))
        kills += kill(process)
        pending += any(t.status == "pending" for t in rows_on_disk(path))
    assert kills >= 20
    assert pending >= 3  # some were hit between the two commits of a trial
    assert len(rows_on_disk(path)) < budget
    resumed, _ = finish(path, "sobol", budget)
    assert problem.outcomes(resumed) == problem.outcomes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [name for name in ENGINES if name not in ("sobol", "saasbo")])
def test_kills_of_a_model_based_study(engine, tmp_path):
    budget, random_moment = 12, random.Random(12)
    whole, notices = finish(tmp_path / "whole.db", engine, budget)
    assert not notices
    path = tmp_path / "killed.db"
    for target in (8, 9, 10, 11):  # in the model-based part: while suggesting, committing or evaluating a trial
        process = start(path, engine, budget, 0.3)
        deadline = time.monotonic() + 120
        while len(rows_on_disk(path)) < target:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(random_moment.uniform(0, 0.8))
        assert kill(process)
    assert len(rows_on_disk(path)) <= budget
    resumed, notices = finish(path, engine, budget)
    assert problem.outcomes(resumed) == problem.outcomes(whole)
    assert not notices
