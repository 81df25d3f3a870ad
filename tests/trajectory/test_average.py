"""Averages over one run's checkpoints: exact sums, order of steps, BatchNorm, refusals, memory, interruption, CLI."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import bmm
from bmm.errors import CheckpointError, MergeError, RecipeError, WriteError
from bmm.trajectory import Scheme
from tests.trajectory.checkpoints import STEPS, mean, save, state


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
