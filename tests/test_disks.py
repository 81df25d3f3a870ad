"""Disks that fill up or cannot be written, inputs that go away midway: an error that says what, nothing half-made."""

import os
import resource
import signal
import subprocess

import pytest
from bmm_cli.main import main

import bmm
from bmm.checkpoint import open_checkpoint
from bmm.errors import BmmError, CheckpointError, RecipeError, StudyError
from bmm.functions import call_function
from bmm.search.database import StudyDatabase
from tests.family import TASKS


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, as a function of its size and options; skipped where mounting is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True)
        if done.returncode:
            pytest.skip("file systems cannot be mounted here")
        return place

    yield mount
    while os.path.ismount(place):
        subprocess.run(["umount", "-l", place], check=True)


def remount(place, options):
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


def fails(capsys, *args):
    """The error of a command that ends with exit code 1: one line and a hint, and no bug."""
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in args])
    shown = capsys.readouterr()
    assert done.value.code == 1, shown.err
    lines = shown.err.strip().splitlines()
    assert len(lines) == 2, shown.err
    assert lines[0].startswith("error: ")
    assert "this is a bug" not in lines[1]
    return shown.err


@pytest.fixture
def commands(family, tmp_path):
    """The commands that write, to a place."""
    recipe = family.yaml(tmp_path / "r.yaml", anchor="task_arithmetic", engine="sobol", budget=4)

    def made(place):
        return {
            "merge": ["merge", "--recipe", recipe, "-o", place / "out", "-q"],
            "average": ["average", *family.experts.values(), "-o", place / "out", "-q"],
            "gram": ["gram", "--recipe", recipe, "--cache", place / "out", "-q"],
            "tune": ["tune", "--recipe", recipe, "-o", place / "out", "-q"],
        }

    return made


@pytest.mark.parametrize("command", ["merge", "average", "gram", "tune"])
def test_a_full_disk_is_said_and_leaves_nothing_that_looks_whole(command, disk, commands, capsys):
    place = disk("size=16k")
    said = fails(capsys, *commands(place)[command])
    assert any(words in said for words in ("No space left", "disk is full", "disk not full"))
    left = [p.name for p in place.rglob("*") if p.is_file()]
    assert not [name for name in left if not name.startswith("study.db")]


@pytest.mark.parametrize("command", ["merge", "average", "gram", "tune"])
def test_a_disk_that_is_read_only_is_said(command, disk, commands, capsys):
    place = disk("size=1m")
    remount(place, "ro")
    assert "Read-only" in fails(capsys, *commands(place)[command])


@pytest.mark.parametrize("size", ["8k", "72k", "104k"])
def test_a_study_goes_on_where_the_disk_was_full(size, disk, commands, capsys):
    """Full while the study is created, in its trials, or when the model is written: the rows are those of a study
    that never stopped."""
    place = disk(f"size={size}")
    command = commands(place)["tune"]
    fails(capsys, *command)
    remount(place, "size=2m")
    begun = StudyDatabase.begun(place / "out" / "study.db")
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in (["tune", "--resume", place / "out", "-q"] if begun else command)])
    assert done.value.code == 0, capsys.readouterr().err
    other = [str(a) for a in command]
    other[other.index("-o") + 1] = str(place / "whole")
    with pytest.raises(SystemExit):
        main(other)
    rows = [
        [(t.kind, t.status, t.hyperparameters, t.scores, t.objective) for t in bmm.load_study(place / name).trials]
        for name in ("out", "whole")
    ]
    assert rows[0] == rows[1]
    open_checkpoint(place / "out" / "model")
    assert not list((place / "out").glob(".*"))


def test_a_model_that_does_not_fit_the_disk_says_how_to_go_on(disk, commands, capsys):
    said = fails(capsys, *commands(disk("size=104k"))["tune"])
    assert "cannot be written" in said
    assert "no trial is lost: then `bmm tune --resume" in said


def test_a_report_that_cannot_be_written_is_a_write_error(commands, tmp_path, monkeypatch, capsys):
    from bmm import tuning

    write = tuning.write_text

    def limited(path, text):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        try:
            write(path, text)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(tuning, "write_text", limited)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        assert "report.md: cannot be written (File too large)" in fails(capsys, *commands(tmp_path)["tune"])
    finally:
        signal.signal(signal.SIGXFSZ, handler)
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.endswith((".tmp", "report.md", "result.json"))]


def test_grams_that_cannot_be_cached_are_noticed_and_used(family, disk):
    notices = []
    grams = bmm.collect_grams(
        family.recipe(cache=str(disk("size=16k") / "c")),
        progress=lambda stage, done, total, text="": stage == "notice" and notices.append(text),
    )
    assert set(grams) == set(TASKS)
    assert any("No space left" in text and "going on without" in text for text in notices)


# inputs that go away


def gone(path):
    path.unlink()


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def replaced(path):
    path.write_bytes(path.read_bytes() + b" ")


@pytest.fixture
def copies(family, tmp_path):
    """Copies of base and experts, each in two shards."""
    from safetensors.torch import load_file

    from bmm.checkpoint import write_checkpoint

    for name in ("base", *TASKS):
        model = load_file(family.folder / name / "model.safetensors")
        size = sum(t.nbytes for t in model.values())
        write_checkpoint(tmp_path / name, sorted(model.items()), max_shard_bytes=size * 2 // 3)
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
    return tmp_path


@pytest.mark.parametrize("harm", [gone, cut, replaced])
@pytest.mark.parametrize("command", ["merge", "ties", "average", "mergekit"])
def test_a_shard_that_goes_away_midway_is_named_and_nothing_is_written(harm, command, copies):
    experts = {name: str(copies / name) for name in TASKS}
    shard = sorted((copies / TASKS[1]).glob("*.safetensors"))[-1]
    seen = []

    def progress(stage, done, total, text=""):
        if stage in ("merge", "average", "scan") and not seen:
            seen.append(stage)
            harm(shard)

    given = {"base": str(copies / "base"), "experts": experts}
    own = [{"model": path, "parameters": {"weight": 0.3}} for path in experts.values()]
    mergekit = {"merge_method": "task_arithmetic", "base_model": given["base"], "models": own}
    run = {
        "merge": lambda: bmm.merge(given, anchor="average", out=copies / "out", progress=progress),
        "ties": lambda: bmm.merge(given, anchor="ties", out=copies / "out", progress=progress),
        "average": lambda: bmm.average(list(experts.values()), copies / "out", order="given", progress=progress),
        "mergekit": lambda: bmm.merge_mergekit(mergekit, out=copies / "out", progress=progress),
    }[command]
    with pytest.raises(CheckpointError, match=shard.name):
        run()
    assert seen
    assert not list(copies.glob("*out*"))


def test_an_expert_that_goes_away_during_a_search_is_named_and_the_study_can_go_on(copies, family):
    recipe = family.recipe(
        base=str(copies / "base"), experts={n: str(copies / n) for n in TASKS}, anchor="task_arithmetic",
        engine="sobol", budget=4, out=str(copies / "run"),
    )  # fmt: skip
    shard = sorted((copies / "base").glob("*.safetensors"))[-1]
    content = shard.read_bytes()

    def lose(trial, best):
        if trial.number == 1:
            shard.unlink()

    with pytest.raises(BmmError, match=shard.name):
        bmm.tune(recipe, on_trial=lose)
    assert not (copies / "run" / "model").exists()
    shard.write_bytes(content)
    result = bmm.tune(resume=copies / "run")
    assert [t.status for t in result.trials] == ["completed"] * 4


# functions of the user's that fail


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f():\n    raise ValueError('two\\nlines')", "f failed: ValueError: two lines"),
        ("import sys\nsys.exit(3)", "cannot be imported: SystemExit: 3"),
        ("def f():\n    raise SystemExit", "f failed: SystemExit"),
        ("f = 3", "has no function 'f'"),
        ("def f(:", "cannot be imported: SyntaxError"),
    ],
)
def test_a_function_that_fails_is_named(text, words, tmp_path):
    (tmp_path / "t.py").write_text(text)
    with pytest.raises(RecipeError, match=words) as error:
        call_function(f"{tmp_path / 't.py'}:f", "tasks")
    assert error.value.hint


def test_the_rest_of_a_start_that_was_cut_off_is_no_study(family, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "study.db").write_bytes(b"")
    recipe = family.recipe(anchor="average", engine="sobol", budget=2, out=str(tmp_path / "run"))
    assert len(bmm.tune(recipe).trials) == 2
    with pytest.raises(StudyError, match="already holds a study"):
        bmm.tune(recipe)
    (tmp_path / "run" / "study.db").write_bytes(b"not a study at all" * 100)
    with pytest.raises(StudyError, match="already holds a study"):
        bmm.tune(recipe)
