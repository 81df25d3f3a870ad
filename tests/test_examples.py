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


def benchmark(name, *flags):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--threads", "1", *map(str, flags)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_benchmarks_make_their_tables_and_pictures(tmp_path):
    """Each runs, goes on from its cells, prints the same table again, and puts it into its page."""
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n<!-- zoo vit8 -->\n<!-- end zoo vit8 -->\n\nafter\n")
    work = ("--budget", 3, "--work", tmp_path / "cells")
    first = benchmark("zoo", "--quick", *work)
    again = benchmark("zoo", "--quick", *work, "--print", "--into", page)
    table = [line for line in again.splitlines() if line.startswith("|")]
    assert table == [line for line in first.splitlines() if line.startswith("|")]
    assert [line.split()[1] for line in table if "±" in line] == ["base", "tsv", "experts"]
    assert page.read_text().startswith("# Page\n\n<!-- zoo vit8 -->\n\nvit8, test accuracy")
    assert page.read_text().endswith("<!-- end zoo vit8 -->\n\nafter\n")
    assert all(line in page.read_text() for line in table)

    ablation = benchmark("ablation", "--seeds", 1, "--variants", "data", "norms", *work)
    assert "+ norms" in ablation
    curve = benchmark("tasks", "--zoo", "vit8", "--counts", 2, 8, "--seeds", 1, "--svg", tmp_path / "t.svg", *work)
    assert curve.count("%") == 2 * 3  # counts, Gram sources
    assert "<svg" in (tmp_path / "t.svg").read_text()
    run = [sys.executable, str(ROOT / "benchmarks" / "pictures.py"), "--work", str(tmp_path / "cells"), "--budget", "3"]
    done = subprocess.run([*run, "--out", str(tmp_path)], capture_output=True, text=True, timeout=100, check=True)
    assert "<svg" in (tmp_path / "vit8.svg").read_text()
    assert "vit20-ends.json is missing" in done.stdout
