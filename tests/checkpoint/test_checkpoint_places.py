"""Where a checkpoint is written, and what is left when that fails."""

import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from bmm.checkpoint import open_checkpoint, write_checkpoint
from bmm.errors import CheckpointError, WriteError
from tests.checkpoint.written import files, original, refused, tensors


def test_places_that_are_taken_are_refused_before_any_tensor_is_made(tmp_path, monkeypatch):
    def stream():
        raise AssertionError("asked for a tensor")
        yield

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note.txt").write_text("mine")
    refused(tmp_path, "not empty", stream())
    refused(tmp_path, "more, or other, than a model's files", stream(), overwrite=True)
    save_file({"a": torch.ones(1)}, tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "sub").mkdir()
    refused(tmp_path, "more, or other, than a model's files", stream(), overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="a file is in the way"):
        write_checkpoint(tmp_path / "file", stream())
    with pytest.raises(WriteError, match="cannot be written"):
        write_checkpoint(tmp_path / "file" / "out", {"a": torch.ones(1)})
    monkeypatch.chdir(tmp_path / "out" / "sub")
    for here in (".", "..", "/"):
        with pytest.raises(WriteError, match="current folder"):
            write_checkpoint(here, stream(), overwrite=True)
    for name in ("../up", "", "..", "a/b", "x.safetensors", "model.safetensors.index.json"):
        refused(tmp_path, "extra file", stream(), extra_files={name: ""})
    refused(tmp_path, "max_shard_bytes", stream(), max_shard_bytes=0)
    assert (tmp_path / "out" / "note.txt").read_text() == "mine"


def test_overwriting_replaces_the_folder_only_when_the_new_one_is_complete(tmp_path):
    out = write_checkpoint(tmp_path / "out", {"old": torch.ones(2)}, extra_files={"README.md": "old"})

    def broken():
        yield "new", torch.ones(3)
        assert open_checkpoint(out).names == ("old",)
        raise RuntimeError("merge failed")

    with pytest.raises(RuntimeError, match="merge failed"):
        write_checkpoint(out, broken(), overwrite=True)
    assert files(tmp_path) == ["out"]
    assert open_checkpoint(out).names == ("old",)
    write_checkpoint(out, {"new": torch.ones(3)}, overwrite=True)
    assert files(tmp_path) == ["out"]
    assert files(out) == ["model.safetensors"]
    assert open_checkpoint(out).names == ("new",)


def test_an_input_is_never_overwritten(tmp_path):
    like = original(tmp_path / "base")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    for place in ("base", "link"):
        with pytest.raises(WriteError, match="overlaps the input"):
            write_checkpoint(tmp_path / place, tensors(), like=like, overwrite=True)
    assert like.fingerprint()


# failures


def test_a_folder_filled_during_the_write_is_left_alone(tmp_path):
    def stream():
        yield "a", torch.ones(1)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("theirs")

    with pytest.raises(WriteError) as caught:
        write_checkpoint(tmp_path / "out", stream())
    assert "filled during the write" in caught.value.hint
    assert files(tmp_path / "out") == ["theirs"]
    assert files(tmp_path) == ["out"]


def test_a_temporary_folder_that_vanishes_is_an_error(tmp_path):
    def stream():
        yield "a", torch.ones(1)
        next(tmp_path.glob(".out.incomplete-*")).rmdir()

    refused(tmp_path, "cannot be written", stream())


def test_a_full_disk_is_a_write_error_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes past the limit then fail as on a full disk
    large = {"a": torch.ones(1), "b": torch.ones(5000)}
    like = original(tmp_path / "base", large)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        refused(tmp_path, r"out: cannot be written \(.*[Tt]oo large", large)
        refused(tmp_path, r"out: cannot be written \(.*[Tt]oo large", large, like=like)
        refused(tmp_path, "too large", {"a": torch.ones(1)}, extra_files={"README.md": "x" * 20_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_parent_is_a_write_error(tmp_path):
    tmp_path.chmod(0o500)
    try:
        refused(tmp_path, "Permission denied", tensors())
    finally:
        tmp_path.chmod(0o700)


def test_a_file_system_that_takes_no_folders_is_a_write_error():
    with pytest.raises(WriteError, match="cannot be written"):
        write_checkpoint("/proc/bmm/out", tensors())


WRITE = """
import sys, torch
from bmm.checkpoint import write_checkpoint
def stream():
    for i in range(200):
        yield f"t{i}", torch.full((50, 50), float(i))
        print(i, flush=True)
write_checkpoint(sys.argv[1], stream(), max_shard_bytes=30_000, extra_files={"README.md": "x"}, overwrite=True)
print("done", flush=True)
"""


@pytest.mark.parametrize("line", [0, 60, 199])
@pytest.mark.parametrize("existing", [False, True])
def test_a_write_killed_at_any_point_leaves_no_folder_that_looks_complete(tmp_path, line, existing):
    out = tmp_path / "out"
    if existing:
        write_checkpoint(out, {"old": torch.ones(1)})
    process = subprocess.Popen([sys.executable, "-c", WRITE, out], stdout=subprocess.PIPE, text=True)
    for text in process.stdout:
        if text.strip() == str(line):
            break
    if line == 199:
        time.sleep(0.004)  # between the last tensor and the swap, or just past it
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    for folder in tmp_path.glob(".out.incomplete-*"):
        with pytest.raises(CheckpointError, match="cut off"):
            open_checkpoint(folder)
    if out.exists():
        names = open_checkpoint(out).names
        assert names == ("old",) if existing and line != 199 else names == ("old",) or len(names) == 200
        assert line == 199 or existing
    elif existing:  # at worst the old folder lies beside its place, complete
        assert open_checkpoint(next(tmp_path.glob(".out.replaced-*"))).names == ("old",)
    for _ in range(2):  # and nothing that was left stands in the way of the next write
        assert open_checkpoint(write_checkpoint(out, {"new": torch.ones(1)}, overwrite=True)).names == ("new",)
