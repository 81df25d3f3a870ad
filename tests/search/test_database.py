import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.errors import StudyError
from bmm.records import Hyperparameters, Trial
from bmm.search.database import SCHEMA, StudyDatabase

finite = st.floats(allow_nan=False, allow_infinity=False)
POINT = Hyperparameters({"a": 0.1, "b": math.inf}, {"a": 1.0, "b": 1 / 3})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study.db"


@settings(deadline=None, max_examples=25)
@given(
    st.dictionaries(st.text(min_size=1), st.one_of(st.floats(0, exclude_min=True), st.just(math.inf)), min_size=1),
    st.dictionaries(st.text(), finite),
    finite,
    st.text(),
)
def test_rows_round_trip_exactly(tmp_path_factory, lam, scores, objective, error):
    path = tmp_path_factory.mktemp("study") / "study.db"
    pending = Trial(0, "anchor", "pending", Hyperparameters(lam, dict.fromkeys(lam, 0.1)), suggest_seconds=0.1)
    error = error.encode("utf-8", "replace").decode()  # lone surrogates are no text
    with StudyDatabase.create(path, {"seed": 3}) as database:
        database.begin(pending)
        assert database.trials() == [pending]
        done = replace(pending, status="completed", scores=scores, objective=objective, seconds=1 / 3, error=error)
        database.finish(done)
    with StudyDatabase.open(path, readonly=True) as database:
        assert database.trials() == [done]
        assert database.meta() == {"seed": 3, "schema": SCHEMA}


def test_meta_notices_and_order(path):
    with StudyDatabase.create(path, {"recipe": {"anchor": "tsv"}, "versions": {"torch": "2"}}) as database:
        database.begin(Trial(1, "default", "pending", POINT), notice="took another")
        database.begin(Trial(0, "anchor", "pending", POINT))
        database.set_meta("recipe", {"anchor": "ties"})
        assert [t.number for t in database.trials()] == [0, 1]
        assert database.notices() == {1: "took another"}
        assert database.meta()["recipe"] == {"anchor": "ties"}
        assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_trial_is_begun_once_and_finished_once(path):
    trial = Trial(0, "anchor", "pending", POINT)
    with StudyDatabase.create(path, {}) as database:
        with pytest.raises(StudyError, match="not pending"):
            database.finish(replace(trial, status="failed"))
        database.begin(trial)
        with pytest.raises(StudyError, match="UNIQUE"):
            database.begin(trial)
        database.finish(replace(trial, status="failed", error="first"))
        with pytest.raises(StudyError, match="not pending"):
            database.finish(replace(trial, status="failed", error="second"))
        assert database.trials()[0].error == "first"


def test_held_out_scores_are_kept_by_trial_and_task(path):
    with StudyDatabase.create(path, {}) as database:
        assert database.held_out() == {}
        database.keep_held_out(3, {"a": [1.0, 0.1], "b": [1 / 3]})
        database.keep_held_out(4, {"a": [0.0]})
        database.keep_held_out(3, {"b": [0.5]})
    with StudyDatabase.open(path) as database:
        assert database.held_out() == {(3, "a"): [1.0, 0.1], (3, "b"): [0.5], (4, "a"): [0.0]}


def test_create_refuses_what_is_there_and_open_what_is_not(path, tmp_path):
    with pytest.raises(StudyError, match="no study at"):
        StudyDatabase.open(path)
    assert not list(tmp_path.iterdir())
    StudyDatabase.create(path, {}).close()
    with pytest.raises(StudyError, match="already exists"):
        StudyDatabase.create(path, {})
    StudyDatabase.open(path).close()  # the refusals let go of the lock


def test_leftover_of_a_creation_killed_before_its_commit_is_taken_over(path):
    path.touch()
    with pytest.raises(StudyError, match="not a study"):
        StudyDatabase.open(path)
    with StudyDatabase.create(path, {"seed": 1}) as database:
        assert database.meta()["seed"] == 1


def test_odd_names_in_the_path(tmp_path):
    path = tmp_path / "a folder?mode=ro#1%20" / "stüdy.db"
    with StudyDatabase.create(path, {}) as database:
        database.begin(Trial(0, "anchor", "pending", POINT))
    assert path.is_file()
    with StudyDatabase.open(path, readonly=True) as database:
        assert len(database.trials()) == 1


def test_readers_read_beside_the_writer_and_cannot_write(path):
    with StudyDatabase.create(path, {}) as writer:
        writer.begin(Trial(0, "anchor", "pending", POINT))
        with StudyDatabase.open(path, readonly=True) as reader:
            assert len(reader.trials()) == 1
            writer.begin(Trial(1, "default", "pending", POINT))
            assert len(reader.trials()) == 2
            with pytest.raises(StudyError, match="readonly"):
                reader.set_meta("seed", 1)
        writer.finish(Trial(0, "anchor", "failed", POINT))


READER = """
import os, sys
from bmm.search.database import StudyDatabase
if os.geteuid() == 0:  # root may write anywhere
    os.setgroups([])
    os.setuid(65534)
try:
    open(sys.argv[1] + "-shm", "w")
except PermissionError:
    print(len(StudyDatabase.open(sys.argv[1], readonly=True).trials()))
"""


def test_a_study_in_a_folder_without_write_permission_can_be_read():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.db"
        with StudyDatabase.create(path, {}) as database:
            database.begin(Trial(0, "anchor", "pending", POINT))
        Path(folder).chmod(0o555)
        done = subprocess.run([sys.executable, "-c", READER, str(path)], capture_output=True, text=True)
        Path(folder).chmod(0o755)
    assert (done.stdout.strip(), done.stderr) == ("1", "")


def damaged(path, how):
    if how == "text":
        path.write_text("recipe: not a database\n" * 100)
    elif how == "other database":
        sqlite3.connect(path).execute("CREATE TABLE notes (id)").connection.close()
    else:
        with StudyDatabase.create(path, {"recipe": "x" * 20_000}) as database:
            for number in range(40):
                database.begin(Trial(number, "search", "pending", POINT))
        connection = sqlite3.connect(path)
        if how == "newer":
            connection.execute("UPDATE meta SET value = ? WHERE key = 'schema'", (str(SCHEMA + 1),))
        elif how == "no schema":
            connection.execute("DELETE FROM meta WHERE key = 'schema'")
        elif how == "odd schema":
            connection.execute("UPDATE meta SET value = 'one' WHERE key = 'schema'")
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        data = path.read_bytes()
        if how == "truncated":
            path.write_bytes(data[: len(data) // 2])
        elif how == "overwritten":
            path.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("text", "damaged or not a study"),
        ("other database", "not a study"),
        ("newer", "newer bmm"),
        ("no schema", "not a study"),
        ("odd schema", "damaged"),
        ("truncated", "damaged"),
        ("overwritten", "damaged"),
    ],
)
def test_what_is_no_sound_study_is_refused_and_left_alone(path, how, said, readonly):
    damaged(path, how)
    before = path.read_bytes()
    with pytest.raises(StudyError, match=said):
        StudyDatabase.open(path, readonly=readonly)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["{", "[]", '{"lam": {}}', '{"lam": {"a": "much"}, "rho": {}}'])
def test_a_damaged_row_is_named_as_such(path, text):
    with StudyDatabase.create(path, {}) as database:
        database.begin(Trial(0, "anchor", "pending", POINT))
    connection = sqlite3.connect(path)
    connection.execute("UPDATE trials SET hyperparameters = ?", (text,))
    connection.commit()
    connection.close()
    with StudyDatabase.open(path) as database, pytest.raises(StudyError, match="row cannot be read"):
        database.trials()


HOLDER = """
import os, sys, time
from bmm.search.database import StudyDatabase
database = StudyDatabase.open(sys.argv[1])
if sys.argv[2] == "alone":
    print("held", 0, flush=True)
elif os.fork() == 0:  # the child speaks: it runs, and has done what it does after a fork
    print("held", os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("mode", ["alone", "fork"])
def test_a_second_process_is_refused_until_the_first_is_killed(path, mode):
    StudyDatabase.create(path, {}).close()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path), mode], stdout=subprocess.PIPE, text=True)
    said, child = holder.stdout.readline().split()
    try:
        assert said == "held"
        for attempt in (StudyDatabase.open, lambda p: StudyDatabase.create(p, {})):
            with pytest.raises(StudyError, match=rf"in use by process {holder.pid} on {os.uname().nodename}"):
                attempt(path)
        with StudyDatabase.open(path, readonly=True) as reader:
            assert reader.trials() == []
        holder.kill()
        holder.wait()
        StudyDatabase.open(path).close()  # even where a forked child of the holder lives on
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
        if int(child):
            os.kill(int(child), signal.SIGKILL)


def test_one_process_cannot_open_a_study_twice(path):
    with StudyDatabase.create(path, {}), pytest.raises(StudyError, match=f"process {os.getpid()}"):
        StudyDatabase.open(path)
    path.with_name("study.db.lock").write_text("no name in it")
    with StudyDatabase.open(path):
        path.with_name("study.db.lock").write_text(json.dumps([]))
        with pytest.raises(StudyError, match="another process"):
            StudyDatabase.open(path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StudyError, match="cannot create"):
        StudyDatabase.create(tmp_path / "file" / "study.db", {})
