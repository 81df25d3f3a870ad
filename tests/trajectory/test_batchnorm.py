"""What becomes of BatchNorm statistics when the checkpoints of a run are averaged."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import update_bn

import bmm
from bmm.errors import RecipeError


def test_swa_is_the_mean_with_statistics_as_torch_measures_them(convolutional, tmp_path):
    folder, space = convolutional
    path = bmm.average(
        folder / "run", tmp_path / "out", method="swa", last=2,
        tasks=f"{folder / 'net.py'}:tasks", model=f"{folder / 'net.py'}:model",
    )  # fmt: skip
    got = load_file(path / "model.safetensors")
    states = [load_file(folder / "run" / f"checkpoint-{s}" / "model.safetensors") for s in (20, 30)]
    net = space["Net"]()
    net.load_state_dict({k: (states[0][k] + states[1][k]) / 2 if v.is_floating_point() else v for k, v in got.items()})
    net.drop = nn.Identity()  # torch's update_bn would drop out; here only the norms train
    update_bn(space["tasks"]()[0].calibration.split(20), net)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6)
        else:
            assert got[name] == states[1][name]
    averaged = (states[0]["bn.running_var"] + states[1]["bn.running_var"]) / 2
    assert not torch.allclose(got["bn.running_var"], averaged, rtol=0.1)
    assert "measured anew" in (path / "README.md").read_text()


def test_what_else_can_become_of_the_statistics(convolutional):
    folder, space = convolutional
    states = [load_file(folder / "run" / f"checkpoint-{s}" / "model.safetensors") for s in (10, 20, 30)]
    notices = []

    def progress(stage, done, total, detail=""):
        if stage == "notice":
            notices.append(detail)

    averaged = bmm.average(folder / "run", progress=progress)
    torch.testing.assert_close(averaged["bn.running_mean"], sum(s["bn.running_mean"] for s in states) / 3)
    assert "averaged like weights" in notices[0]
    last = bmm.average(folder / "run", method="swa", batchnorm="last")
    assert torch.equal(last["norm.running_var"], states[2]["norm.running_var"])
    torch.testing.assert_close(last["out.weight"], averaged["out.weight"])
    with pytest.raises(RecipeError, match="holds BatchNorm statistics") as error:
        bmm.average(folder / "run", method="swa")
    assert "batchnorm: last" in error.value.hint
    tasks = space["tasks"]()
    measured = [bmm.average(folder / "run", tasks=tasks, model=space["Net"], calibration=n) for n in (20, 40)]
    assert not torch.equal(measured[0]["bn.running_mean"], measured[1]["bn.running_mean"])
    again = bmm.average(folder / "run", method="swa", tasks=tasks, model=space["Net"], calibration=20)
    assert all(torch.equal(again[k], v) for k, v in measured[0].items())


def test_checkpoints_with_older_names_need_no_model(tmp_path):
    """ResNet saved without the prefix of its base model, as transformers still reads it."""
    import transformers

    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for step in (10, 20):
            folder = tmp_path / "run" / f"checkpoint-{step}"
            transformers.ResNetForImageClassification(config).save_pretrained(folder)
            own = load_file(folder / "model.safetensors")
            save_file({n.removeprefix("resnet."): t for n, t in own.items()}, folder / "model.safetensors")
        x = {"pixel_values": torch.randn(12, 1, 16, 16)}
    task = bmm.Task("t", validation=(x, torch.zeros(12, dtype=torch.int64)), calibration=x, batch_size=4)
    got = bmm.average(tmp_path / "run", method="swa", tasks=[task])
    stored = load_file(tmp_path / "run" / "checkpoint-20" / "model.safetensors")
    assert set(got) == set(stored)
    statistic = next(n for n in stored if n.endswith("embedder.normalization.running_mean"))
    weights = [load_file(tmp_path / "run" / f"checkpoint-{s}" / "model.safetensors") for s in (10, 20)]
    kernel = next(n for n in stored if n.endswith("embedder.convolution.weight"))
    mean = (weights[0][kernel] + weights[1][kernel]) / 2
    seen = torch.nn.functional.conv2d(x["pixel_values"], mean, stride=2, padding=3).mean((0, 2, 3))
    torch.testing.assert_close(got[statistic], seen, rtol=1e-4, atol=1e-6)


def test_tasks_that_cannot_measure_are_refused(convolutional):
    folder, space = convolutional
    (task,) = space["tasks"]()

    def refuses(match, task, model=space["Net"]):
        with pytest.raises(RecipeError, match=match):
            bmm.average(folder / "run", method="swa", tasks=[task], model=model)

    refuses("no calibration inputs", bmm.Task("t", validation=task.validation))
    refuses(
        "more than 1 value per channel", bmm.Task("t", task.validation, calibration=task.calibration, batch_size=49)
    )
    refuses("empty calibration", bmm.Task("t", task.validation, calibration=task.calibration[:0]))
    refuses("list of bmm.Task", "t")
    refuses("has parameters the checkpoints lack|checkpoints have parameters", task, lambda: nn.BatchNorm1d(3))
