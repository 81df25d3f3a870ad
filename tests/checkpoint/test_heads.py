"""Task heads: refused, left to the base, or kept beside the merge."""

import json

import pytest
import torch
from bmm_cli.main import bmm as main_command
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import bmm
from bmm.checkpoint import ModelPool
from bmm.checkpoint.heads import head_of
from bmm.errors import CheckpointError


def write(path, classes, value):
    tensors = {"bert.layer.0.dense.weight": torch.full((4, 4), value), "bert.layer.0.head.weight": torch.ones(2, 2)}
    if classes:
        tensors |= {
            "classifier.weight": torch.full((classes, 4), value),
            "classifier.bias": torch.full((classes,), value),
        }
    save_file(tensors, path, {"format": "pt"})
    return str(path)


@pytest.fixture
def keys(tmp_path):
    experts = {"two": write(tmp_path / "two.safetensors", 2, 1.0), "five": write(tmp_path / "five.safetensors", 5, 3.0)}
    return {"base": write(tmp_path / "base.safetensors", 2, 0.0), "experts": experts, "anchor": "average"}


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("classifier.dense.weight", "classifier"),
        ("model.score.weight", "model.score"),
        ("bert.encoder.layer.0.head.weight", ""),
        ("lm_head.weight", "lm_head"),
        ("cls.predictions.bias", "cls"),
        ("model.norm.weight", ""),
        ("head", ""),
    ],
)
def test_heads_are_told_by_their_names(name, head):
    assert head_of(name) == head


def test_heads_that_differ_are_refused_by_default(keys):
    with pytest.raises(CheckpointError, match=r"expert 'five' .*classifier\.bias base \(2,\), expert \(5,\)") as caught:
        bmm.merge(keys)
    assert "heads: base" in caught.value.hint
    assert 'skip: ["classifier.*"]' in caught.value.hint


def test_heads_are_left_to_the_base_also_where_they_have_one_shape(keys):
    merged = bmm.merge(keys, heads="base")
    assert torch.equal(merged["classifier.weight"], torch.zeros(2, 4))
    assert torch.equal(merged["bert.layer.0.dense.weight"], torch.full((4, 4), 2.0))
    pool = ModelPool.open(keys["base"], list(keys["experts"].values()), heads="base")
    assert pool.heads == {}
    assert "two: head left out of the merge: classifier.bias, classifier.weight" in pool.notices


def test_heads_are_kept_by_task_beside_the_merge(keys, tmp_path):
    out = bmm.merge(keys, heads="keep", out=tmp_path / "out")
    assert sorted(p.name for p in (out / "heads").iterdir()) == ["five.safetensors", "two.safetensors"]
    five = load_file(out / "heads" / "five.safetensors")
    assert torch.equal(five["classifier.weight"], torch.full((5, 4), 3.0))
    assert torch.equal(load_file(out / "model.safetensors")["classifier.bias"], torch.zeros(2))
    again = bmm.merge(keys, heads="keep", out=out, overwrite=True, adapter_rank=1)
    assert sorted(p.name for p in again.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "bmm_recipe.yaml", "heads", "truncation.json",
    ]  # fmt: skip
    assert torch.equal(load_file(again / "heads" / "five.safetensors")["classifier.bias"], torch.full((5,), 3.0))


def test_a_base_without_the_head(keys, tmp_path):
    keys["base"] = write(tmp_path / "bare.safetensors", 0, 0.0)
    out = bmm.merge(keys, heads="keep", out=tmp_path / "out")
    assert "classifier.weight" not in load_file(out / "model.safetensors")
    assert len(load_file(out / "heads" / "two.safetensors")) == 2


def test_asking_for_heads_where_there_are_none_is_an_error(tmp_path):
    paths = [write(tmp_path / f"{k}.safetensors", 0, float(k)) for k in range(2)]
    with pytest.raises(CheckpointError, match="no task head in the experts"):
        ModelPool.open(paths[0], paths[1:], heads="keep")


def test_inspect_shows_heads(keys):
    paths = [keys["base"], keys["experts"]["two"]]
    data = json.loads(CliRunner().invoke(main_command, ["inspect", *paths, "--json"]).stdout)
    assert data["checkpoints"][1]["heads"] == ["classifier"]
    run = CliRunner().invoke(main_command, ["inspect", keys["base"], keys["experts"]["five"], "--heads", "base"])
    assert run.exit_code == 0
    assert "note: five: head left out of the merge" in run.output
