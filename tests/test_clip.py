"""examples/clip: its functions on a small hub of random weights, and downloads from a stand-in for the real one."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.hub import serve

FOLDER = Path(__file__).parents[1] / "examples" / "clip"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
TASKS = ["mnist", "dtd"]
SMALL = ["--tasks", *TASKS, "--calibration", "8", "--validation", "8", "--test", "0", "--budget", "3"]


def run(script, *words, **environment):
    command = [sys.executable, str(FOLDER / script), *map(str, words)]
    done = subprocess.run(command, env=ENV | environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def clip():
    spec = importlib.util.spec_from_file_location("clip", FOLDER / "clip.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["clip"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["clip"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The small hub, and the run that was prepared from it."""
    folder = tmp_path_factory.mktemp("clip")
    code, _, errors = run("smoke.py", folder, *SMALL, "--prepare")
    assert code == 0, errors
    return folder


def test_prompts_are_as_many_as_the_protocol_has(clip):
    counts = {"sun397": 2, "cars": 8, "resisc45": 18, "eurosat": 3, "svhn": 1, "gtsrb": 3, "mnist": 1, "dtd": 8}
    assert {name: len(set(source.templates)) for name, source in clip.TASKS.items()} == counts
    assert all(template.count("{}") == 1 for source in clip.TASKS.values() for template in source.templates)


@pytest.mark.slow
def test_the_splits_are_apart_and_the_models_whole(hub):
    tasks = yaml.safe_load((hub / "run" / "tasks.yaml").read_text())
    assert list(tasks) == TASKS
    from pyarrow.parquet import read_table

    for task in tasks.values():
        rows = {s: read_table(hub / "run" / task[s])["image"].to_pylist() for s in ("train", "validation", "test")}
        images = {s: {row["bytes"] for row in found} for s, found in rows.items()}
        assert {s: len(found) for s, found in images.items()} == {"train": 8, "validation": 8, "test": 16}
        assert not images["validation"] & images["test"]
    base, expert = (load_file(hub / "run" / "models" / n / "model.safetensors") for n in ("base", "mnist"))
    published = load_file(hub / "models" / "clip-vit-base-patch32_mnist" / "model.safetensors")
    assert set(expert) == set(base) == {*published, "visual_projection.weight"}
    assert torch.equal(expert["visual_projection.weight"], base["visual_projection.weight"])
    assert all(torch.equal(expert[name], tensor) for name, tensor in published.items())


@pytest.mark.slow
def test_the_smoke_run_scores_each_expert_as_transformers_does(hub):
    """Labels are what transformers says of the expert: heads, images, names and projection must all be right for 1."""
    places = ["--models", hub / "models", "--data", hub / "data", "--out", hub / "run"]
    code, out, errors = run("clip.py", *SMALL, *places, "--", "--engine", "sobol")
    assert code == 0, errors
    result = json.loads((hub / "run" / "run" / "result.json").read_text())
    assert [score["value"] for score in result["test"]["experts"]] == [1.0, 1.0]
    assert sum(score["value"] for score in result["test"]["base"]) < 2
    assert out.count("| mnist") == 2  # the tables of test and validation
    code, _, errors = run("clip.py", *SMALL, *places, "--anchor", "ties")
    assert code == 1
    assert "holds a study with anchor tsv" in errors
    code, out, errors = run("clip.py", *SMALL, *places, "--budget", "4")
    assert code == 0, errors
    assert "4 completed" in out


@pytest.mark.slow
def test_downloads_are_what_a_folder_would_have_been(hub, tmp_path):
    repositories = {
        "openai/clip-vit-base-patch32": hub / "models" / "clip-vit-base-patch32",
        "tanganke/clip-vit-base-patch32_mnist": hub / "models" / "clip-vit-base-patch32_mnist",
        "tanganke/clip-vit-base-patch32_dtd": hub / "models" / "clip-vit-base-patch32_dtd",
        "datasets/ylecun/mnist": hub / "data" / "mnist",
        "datasets/tanganke/dtd": hub / "data" / "dtd",
    }
    extra = hub / "data" / "dtd" / "data" / "contrast-00000-of-00001.parquet"
    extra.write_bytes(b"a split that nobody asked for")
    places = ["--models", tmp_path / "models", "--data", tmp_path / "data", "--out", tmp_path / "run"]
    with serve(repositories) as (address, downloaded):
        settings = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        code, _, errors = run("clip.py", *SMALL, *places, "--prepare", **settings)
        assert code == 0, errors
        assert len(downloaded) == len(set(downloaded)) == 5 + 2 + 2 * 3, downloaded
        for name in ("models/mnist/model.safetensors", "data/dtd/test.parquet", "data/mnist/train.parquet"):
            assert (tmp_path / "run" / name).read_bytes() == (hub / "run" / name).read_bytes(), name
        first = len(downloaded)
        assert run("clip.py", *SMALL, *places, "--prepare", **settings)[0] == 0
        assert len(downloaded) == first  # what is there is used
        (tmp_path / "data" / "mnist" / "mnist" / "train-00001-of-00002.parquet").unlink()
        assert run("clip.py", *SMALL, *places, "--prepare", **settings)[0] == 0
        assert len(downloaded) == first + 1  # and what was cut off is completed
    code, _, errors = run("clip.py", *places, "--tasks", "svhn", "--prepare", **settings)
    assert code == 1
    assert "cannot download tanganke/clip-vit-base-patch32_svhn" in errors
    assert "put it into" in errors
