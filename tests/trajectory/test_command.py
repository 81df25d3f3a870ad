"""Averaging a training run: memory, interruption, and the command line."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from bmm_cli.main import main
from safetensors.torch import load_file

import bmm
from tests.trajectory.checkpoints import save

ENV = os.environ | {"OMP_NUM_THREADS": "1"}


BMM = [sys.executable, "-c", "from bmm_cli.main import main; main()"]


# -- size and interruption ---------------------------------------------------------------------------------------------

MEMORY = """
import resource, sys
import bmm
bmm.average
import torch
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.zeros(512, 1024, dtype=torch.float64).add_(torch.ones(512, 1024), alpha=0.5)
before = peak()
bmm.average(sys.argv[1], sys.argv[1] + "/out", shard_gib=4 / 1024, method="ema")
print(peak() - before)
"""


def test_peak_memory_does_not_grow_with_checkpoints(tmp_path):
    weights = {f"m{k}.weight": torch.full((512, 1024), float(k)) for k in range(16)}  # 32 MiB a checkpoint, 2 a tensor
    for step in range(8):
        save(tmp_path / f"checkpoint-{step}", weights)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, env=ENV, timeout=200
    )
    assert done.returncode == 0, done.stderr
    # A shard of 4 MiB, twice while it is written, a tensor and its float64 sum; one checkpoint alone would be 32.
    assert float(done.stdout) < 24


def test_an_interrupted_write_leaves_no_model(tmp_path):
    weights = {f"m{k}.weight": torch.randn(512, 512) for k in range(40)}
    for step in range(6):
        save(tmp_path / "run" / f"checkpoint-{step}", weights)
    out = tmp_path / "to" / "out"
    command = [*BMM, "average", str(tmp_path / "run"), "--out", str(out), "--shard-gib", "0.001"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while process.poll() is None and not list(tmp_path.glob("to/.out.incomplete-*/shard-*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.strip().endswith("interrupted")
    assert list((tmp_path / "to").iterdir()) == []


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def cli(capsys):
    """The command in this process: its exit code, output and errors."""

    def call(*args, code=0):
        with pytest.raises(SystemExit) as left:
            main(["average", *map(str, args)])
        out, err = capsys.readouterr()
        assert left.value.code == code, err
        return out, err

    return call


def test_the_command_does_what_the_function_does(run, tmp_path, cli):
    out, err = cli(*(run / f"checkpoint-{s}" for s in (1000, 200, 50, 100)), "--last", 2, "-o", tmp_path / "a")
    assert str(tmp_path / "a") in out
    assert "averaging: 3 done" in err
    stored = load_file(tmp_path / "a" / "model.safetensors")
    expected = bmm.average(run, last=2)
    assert all(torch.equal(stored[k], expected[k]) for k in expected)
    flags = ["--method", "lawa", "--window", 2, "--each", "--json", "--quiet", "--out", tmp_path / "w"]
    each = json.loads(cli(run, *flags)[0])
    assert len(each["checkpoints"]) == 3


def test_swa_on_the_command_line(convolutional, tmp_path, cli):
    folder, space = convolutional
    net = folder / "net.py"
    flags = ["--method", "swa", "--tasks", f"{net}:tasks", "--model", f"{net}:model"]
    data = json.loads(cli(folder / "run", *flags, "-o", tmp_path / "s", "--json", "-q")[0])
    stored = load_file(f"{data['checkpoint']}/model.safetensors")
    expected = bmm.average(folder / "run", method="swa", tasks=space["tasks"](), model=space["Net"])
    assert all(torch.equal(stored[k], expected[k]) for k in expected)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "sw"], "did you mean swa"),
        (["--decay", "0.5"], "uniform takes no decay"),
        (["--device", "cuda"], "recompute only"),
        (["--last", "9"], "there are 4 checkpoints"),
        (["--calibration", "0"], "--calibration"),
    ],
    ids=str,
)
def test_mistakes_are_usage_errors(run, tmp_path, cli, flags, words):
    out, err = cli(run, "-o", tmp_path / "x", *flags, code=2)
    assert out == ""
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "x").exists()
