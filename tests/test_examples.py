"""The commands in the examples' READMEs, run as they stand with a smaller budget."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def commands(example):
    text = (ROOT / "examples" / example / "README.md").read_text()
    (block,) = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    return [line.split() for line in block.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("example", ["vit8", "vit20"])
def test_commands_of_the_example(example, tmp_path):
    env = ENV | {"BMM_VIT20": str(ROOT / "examples" / "vit20" / "zoo")}
    for command in commands(example):
        small = ["3" if word == "50" else word for word in command]
        done = subprocess.run(small, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("|") > 8


@pytest.mark.slow
def test_benchmark_in_its_quick_mode(tmp_path):
    """The script that makes the README's table runs, resumes from its cells, and prints the same table twice."""
    command = [sys.executable, str(ROOT / "benchmarks" / "vit8.py"), "--quick", "--budget", "4"]
    script = [*command, "--work", str(tmp_path)]
    first = subprocess.run(script, env=ENV, capture_output=True, text=True, timeout=500)
    assert first.returncode == 0, first.stderr
    assert "gap closed" in first.stdout
    again = subprocess.run(script, env=ENV, capture_output=True, text=True, timeout=500)
    assert again.stdout == first.stdout
