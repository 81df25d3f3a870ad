"""Averages over one run's checkpoints: exact sums, order of steps, BatchNorm, refusals, memory, interruption, CLI."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from bmm_cli.main import main
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import update_bn

import bmm
from bmm.errors import CheckpointError, MergeError, RecipeError, WriteError
from bmm.trajectory import Scheme

ENV = os.environ | {"OMP_NUM_THREADS": "1"}
BMM = [sys.executable, "-c", "from bmm_cli.main import main; main()"]
STEPS = (50, 100, 200, 1000)


def state(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(6, 5, generator=generator).to(dtype),
        "b.bias": torch.randn(4, generator=generator).to(dtype),
        "steps": torch.tensor(seed),
    }


def save(folder, tensors, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "x"} | config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def run(tmp_path):
    """A run's folder with checkpoints 50, 100, 200 and 1000 (whose names do not sort in that order)."""
    for step in STEPS:
        save(tmp_path / "run" / f"checkpoint-{step}", state(step))
    return tmp_path / "run"


def mean(seeds, shares=None, name="a.weight"):
    shares = shares or [1 / len(seeds)] * len(seeds)
    return sum(a * state(s)[name].double() for a, s in zip(shares, seeds, strict=True))


def close(tensor, expected):
    torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-6)


# -- the sums ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "seeds", "shares"),
    [
        ({}, STEPS, [0.25] * 4),
        ({"last": 2}, (200, 1000), [0.5, 0.5]),
        ({"share": 0.3}, (200, 1000), [0.5, 0.5]),
        ({"share": 0.25}, (1000,), [1.0]),
        ({"method": "ema", "decay": 0.5}, STEPS, [0.125, 0.125, 0.25, 0.5]),
        ({"method": "ema", "decay": 0.0}, (1000,), [1.0]),
        ({"method": "ema"}, STEPS, [0.729, 0.081, 0.09, 0.1]),
        ({"method": "lawa", "window": 2}, (200, 1000), [0.5, 0.5]),
        ({"method": "lawa", "window": 2, "interval": 2}, (100, 1000), [0.5, 0.5]),
        ({"method": "swa", "last": 3}, (100, 200, 1000), [1 / 3] * 3),
    ],
    ids=str,
)
def test_every_scheme_is_its_hand_formula(run, options, seeds, shares):
    averaged = bmm.average(run, **options)
    for name in ("a.weight", "b.bias"):
        close(averaged[name], mean(seeds, shares, name))
    assert averaged["steps"] == 1000
    assert averaged["a.weight"].dtype == torch.float32


def test_an_exponential_average_is_the_recursion(run):
    averaged = state(50)["a.weight"].double()
    for step in STEPS[1:]:
        averaged = 0.7 * averaged + 0.3 * state(step)["a.weight"].double()
    close(bmm.average(run, method="ema", decay=0.7)["a.weight"], averaged)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_weights_sum_to_one_and_shares_round_up(count):
    for scheme in (Scheme(), Scheme("ema", decay=0.99), Scheme("lawa", window=1, each=True), Scheme(share=0.3)):
        for plan in scheme.plans(count):
            assert sum(plan.values()) == pytest.approx(1)
    assert len(Scheme(share=0.3).plans(10)[0]) == 3
    assert len(Scheme(share=0.31).plans(10)[0]) == 4


def test_one_checkpoint_comes_back_bit_for_bit(run, tmp_path):
    path = bmm.average(run, tmp_path / "out", last=1)
    assert load_file(path / "model.safetensors").keys() == state(1000).keys()
    assert all(torch.equal(v, state(1000)[k]) for k, v in load_file(path / "model.safetensors").items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_wide_and_storage_is_the_checkpoints(dtype, tmp_path):
    for step in range(1, 4):
        save(tmp_path / f"checkpoint-{step}", state(step, dtype), dtype=str(dtype).removeprefix("torch."))
    path = bmm.average(tmp_path, tmp_path / "out")
    stored = load_file(path / "model.safetensors")
    expected = sum(state(s, dtype)["a.weight"].double() for s in (1, 2, 3)) / 3
    tolerance = 1e-15 if dtype == torch.float64 else 0.0  # narrower sums are rounded once
    torch.testing.assert_close(stored["a.weight"], expected.to(dtype), rtol=tolerance, atol=tolerance)
    assert json.loads((path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    wide = bmm.average(tmp_path, dtype="float32")
    assert wide["a.weight"].dtype == torch.float32
    close(wide["a.weight"], expected)


def test_values_near_the_limit_of_the_format(tmp_path):
    top = torch.full((3,), 65504.0, dtype=torch.float16)
    for step in range(1, 8):
        save(tmp_path / f"checkpoint-{step}", {"w": top})
    assert torch.equal(bmm.average(tmp_path)["w"], top)


def test_each_window_is_a_checkpoint(run, tmp_path):
    paths = bmm.average(run, tmp_path / "w", method="lawa", window=2, each=True)
    assert [p.name for p in paths] == ["checkpoint-100", "checkpoint-200", "checkpoint-1000"]
    for path, seeds in zip(paths, [(50, 100), (100, 200), (200, 1000)], strict=True):
        stored = load_file(path / "model.safetensors")
        close(stored["a.weight"], mean(seeds))
        assert stored["steps"] == seeds[-1]


# -- which checkpoints, in which order ---------------------------------------------------------------------------------


def test_folders_globs_and_lists_are_put_in_order_of_steps(run):
    by_folder = bmm.average(run, last=2)
    listed = [run / f"checkpoint-{s}" for s in (1000, 200, 50, 100)]
    assert torch.equal(bmm.average(listed, last=2)["a.weight"], by_folder["a.weight"])
    assert torch.equal(bmm.average(f"{run}/checkpoint-*", last=2)["a.weight"], by_folder["a.weight"])
    close(bmm.average(listed, last=2, order="given")["a.weight"], mean((50, 100)))


def test_single_files(tmp_path):
    for step in (9, 10):
        save_file(state(step), tmp_path / f"step_{step}.safetensors")
    close(bmm.average(f"{tmp_path}/*.safetensors", last=1)["a.weight"], mean((10,)))
    for name in ("x", "y"):
        save_file(state(len(name)), tmp_path / f"{name}.safetensors")
    close(bmm.average([tmp_path / "x.safetensors", tmp_path / "y.safetensors"])["b.bias"], mean((1, 1), name="b.bias"))


def test_checkpoints_that_are_not_a_run_are_refused(run, tmp_path):
    def refuses(error, match, *args, **options):
        with pytest.raises(error, match=match):
            bmm.average(*args, **options)

    first, last = run / "checkpoint-50", run / "checkpoint-1000"
    refuses(RecipeError, "nothing matches", f"{tmp_path}/no/*")
    refuses(RecipeError, "no checkpoints", [])
    refuses(RecipeError, "is given twice", [first, first])
    refuses(CheckpointError, "no-such", [first, tmp_path / "no-such-5"])
    other = save(tmp_path / "again" / "checkpoint-50", state(1))
    refuses(RecipeError, "both of step 50", [first, other])
    final = save(tmp_path / "final", state(1))
    refuses(RecipeError, "final has no step number", [first, final])
    lacking = save(tmp_path / "l-1", {k: v for k, v in state(1).items() if k != "b.bias"})
    refuses(CheckpointError, r"l-1 lacks b.bias, compared with .*checkpoint-1000", [lacking, last])
    extra = save(tmp_path / "e-1", state(1) | {"head": torch.ones(1)})
    refuses(CheckpointError, "e-1 has the further head", [extra, last])
    turned = save(tmp_path / "t-1", state(1) | {"a.weight": torch.ones(5, 6)})
    refuses(CheckpointError, r"a.weight is torch.float32 \(5, 6\) in .*t-1", [turned, last])
    broken = save(tmp_path / "n-1", state(1) | {"b.bias": torch.full((4,), float("nan"))})
    refuses(MergeError, r"b.bias of .*n-1 holds 4 non-finite", [broken, last])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "uniformly"}, "no averaging method"),
        ({"decay": 0.5}, "uniform takes no decay"),
        ({"method": "ema", "last": 2}, "ema takes no last"),
        ({"method": "ema", "each": True}, "ema takes no each"),
        ({"last": 5}, "last is 5, but there are 4"),
        ({"last": 0}, "last is 0"),
        ({"last": 2, "share": 0.5}, "exclude each other"),
        ({"share": 1.5}, "share is 1.5"),
        ({"method": "ema", "decay": 1.0}, "decay is 1.0"),
        ({"method": "lawa", "window": 3, "interval": 2}, "needs 5 checkpoints, not 4"),
        ({"method": "lawa"}, "a window of 6"),
        ({"method": "lawa", "window": 2, "each": True}, "each writes"),
        ({"lats": 2}, "no option 'lats'"),
        ({"batchnorm": "keep"}, "no batchnorm 'keep'"),
        ({"order": "time"}, "no order 'time'"),
        ({"dtype": "int8"}, "no dtype 'int8'"),
        ({"calibration": 3}, "calibration is for batchnorm: recompute only"),
        ({"device": "cuda"}, "device is for batchnorm: recompute only"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(run, options, match):
    with pytest.raises(RecipeError, match=match):
        bmm.average(run, **options)


# -- writing -----------------------------------------------------------------------------------------------------------


def test_the_written_folder_is_a_model_with_a_card(run, tmp_path):
    path = bmm.average(run, tmp_path / "out", method="ema", decay=0.5, shard_gib=1e-7)
    shards = sorted(p.name for p in path.glob("*.safetensors"))
    assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert (path / "config.json").is_file()
    card = (path / "README.md").read_text()
    for words in ("checkpoint-1000", "0.125", "`ema`", "--decay 0.5"):
        assert words in card
    with pytest.raises(WriteError, match="not empty"):
        bmm.average(run, path)
    bmm.average(run, path, overwrite=True)
    assert not (path / "model-00001-of-00003.safetensors").exists()


def test_the_checkpoints_themselves_are_never_overwritten(run):
    for target in (run, run / "checkpoint-50", run / "checkpoint-1000"):
        with pytest.raises(WriteError, match="overlaps the input"):
            bmm.average(run, target, overwrite=True)
    assert torch.equal(load_file(run / "checkpoint-50" / "model.safetensors")["a.weight"], state(50)["a.weight"])


def test_a_failed_average_leaves_nothing(run, tmp_path):
    save_file(state(5) | {"b.bias": torch.full((4,), float("inf"))}, run / "checkpoint-100" / "model.safetensors")
    with pytest.raises(MergeError, match="checkpoint-100"):
        bmm.average(run, tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []


# -- BatchNorm ---------------------------------------------------------------------------------------------------------

SOURCE = textwrap.dedent(
    """
    import torch
    from torch import nn
    import bmm


    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.bn = nn.BatchNorm2d(4)
            self.drop = nn.Dropout(0.5)
            self.out = nn.Linear(4, 3)
            self.norm = nn.BatchNorm1d(3, momentum=0.3)

        def forward(self, x):
            return self.norm(self.out(self.drop(torch.relu(self.bn(self.conv(x))).mean((2, 3)))))


    def model():
        return Net()


    def tasks():
        x = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        y = torch.zeros(50, dtype=torch.int64)
        return [bmm.Task("t", validation=(x, y), calibration=3 * x + 1, batch_size=20)]
    """
)


@pytest.fixture(scope="module")
def convolutional(tmp_path_factory):
    """Three checkpoints of a small net with BatchNorm, and the file of its model and tasks."""
    folder = tmp_path_factory.mktemp("bn")
    (folder / "net.py").write_text(SOURCE)
    space = {}
    exec(SOURCE, space)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = space["Net"]()
        for step in (10, 20, 30):
            net.train()
            for parameter in net.parameters():
                parameter.data += 0.2 * torch.randn_like(parameter)
            net(torch.randn(16, 1, 8, 8))
            save(folder / "run" / f"checkpoint-{step}", net.state_dict())
    return folder, space


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
