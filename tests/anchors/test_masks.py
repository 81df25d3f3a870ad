"""Masked models: EMR and TALL masks in memory and on disk, what they reconstruct, what they cost, what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bmm.anchors import MaskedModels, emr_compress, merge, tall_compress
from bmm.checkpoint import open_checkpoint
from bmm.errors import CheckpointError, MergeError, WriteError

from .models import SHAPES, Lazy, family
from .test_kernels import assert_close, tensor

FLOATING = [name for name in SHAPES if name != "empty"]
TASKS = ("cars", "dogs", "birds")


def on_disk(folder, models):
    """Checkpoints of a base and experts, opened."""
    opened = []
    for name, model in zip(("base", *TASKS), models, strict=False):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text('{"model_type": "test"}')
        save_file(model, folder / name / "model.safetensors")
        opened.append(open_checkpoint(folder / name))
    return opened


@pytest.fixture
def disk(tmp_path):
    base, models = family(3)
    return on_disk(tmp_path, [base, *models])


def taus_of(base, models, name):
    return np.stack([(m[name] - base[name]).double().numpy() for m in models])


def test_emr_by_hand():
    base = {"w": tensor(1, 1, 1, 1)}
    a, b = {"w": tensor(3, 0, 1, 2)}, {"w": tensor(2, 4, 1, 0)}  # taus 2 -1 0 1 and 1 3 0 -1
    masked = emr_compress(base, [a, b], ["a", "b"])
    assert masked.vector["w"].tolist() == [2, 3, 0, 0]
    assert masked.mask("a", "w").tolist() == [True, False, False, False]
    assert masked.mask("b", "w").tolist() == [True, True, False, False]
    assert masked.rescalers == (4 / 2, 5 / 5)
    assert masked.reconstruct("a")["w"].tolist() == [5, 1, 1, 1]
    assert masked.reconstruct("b")["w"].tolist() == [3, 4, 1, 1]
    assert dict(masked.unified())["w"].tolist() == [3, 4, 1, 1]


def test_tall_by_hand():
    base = {"w": tensor(1, 1, 1)}
    a, b = {"w": tensor(3, 0, 1)}, {"w": tensor(2, 5, 1)}  # taus 2 -1 0 and 1 4 0
    masked = tall_compress(base, [a, b], mask_strength=0.5)
    assert masked.tasks == ("expert1", "expert2")
    assert masked.vector["w"].tolist() == [3, 3, 0]
    assert masked.mask("expert1", "w").tolist() == [True, False, True]  # 1 >= 0.5 * 4 fails
    assert masked.reconstruct("expert1")["w"].tolist() == [4, 1, 1]
    each = tall_compress(base, [a, b], mask_strength=[0.2, 3.0])
    assert each.mask("expert1", "w").tolist() == [True, True, True]
    assert each.mask("expert2", "w").tolist() == [False, True, True]  # 1 >= 3 * 2 fails, 4 >= 3 * 1 holds
    assert each.rescalers == (1, 1)


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, -0.25]])
def test_emr_matches_its_formula_over_the_whole_model(weights):
    base, models = family(3)
    masked = emr_compress(base, models, TASKS, weights=weights)
    unified = merge("emr", base, models, weights=weights)
    own, shared, parts = np.zeros(3), np.zeros(3), {}
    for name in FLOATING:
        taus = taus_of(base, models, name)
        kept = taus * np.reshape(weights or [1, 1, 1], (3, *[1] * (taus.ndim - 1)))
        sign = np.sign(kept.sum(0))
        vector = sign * np.where(np.sign(kept) == sign, np.abs(kept), 0).max(0)
        masks = taus * vector > 0
        parts[name] = masks * vector
        own += np.abs(taus).reshape(3, -1).sum(1)
        shared += np.abs(parts[name]).reshape(3, -1).sum(1)
        assert_close(unified[name] - base[name], vector)
    assert_close(masked.rescalers, own / shared, 1e-6)
    for t, task in enumerate(TASKS):
        model = masked.reconstruct(task)
        assert list(model) == list(base)
        for name in FLOATING:
            assert_close(model[name], base[name].double().numpy() + own[t] / shared[t] * parts[name][t])
        assert torch.equal(model["steps"], base["steps"])


def test_tall_matches_its_formula():
    base, models = family(3)
    masked = tall_compress(base, models, TASKS, mask_strength=0.3)
    for name in FLOATING:
        taus = taus_of(base, models, name)
        total = taus.sum(0)
        for t, task in enumerate(TASKS):
            expected = np.where(np.abs(taus[t]) >= 0.3 * np.abs(total - taus[t]), total, 0)
            assert_close(masked.reconstruct(task)[name], base[name].double().numpy() + expected)


def test_reconstruction_is_nearer_to_the_expert_than_the_merge():
    base, models = family(3)
    masked, merged = emr_compress(base, models, TASKS), merge("emr", base, models)
    for task, expert in zip(TASKS, models, strict=True):
        own = masked.reconstruct(task)
        off, off_merged = (sum(float((m[n] - expert[n]).square().sum()) for n in FLOATING) for m in (own, merged))
        assert off < 0.6 * off_merged


@pytest.mark.parametrize("compress", [emr_compress, tall_compress])
def test_one_expert_and_zero_task_vectors(compress):
    base, (expert,) = family(1)
    own = compress(base, [expert], ["a"]).reconstruct("a")
    for name in FLOATING:
        torch.testing.assert_close(own[name], expert[name], rtol=1e-5, atol=1e-6)
    still = compress(base, [base, expert, base], TASKS)
    assert all(np.isfinite(still.rescalers))
    zero = compress(base, [base, base])
    for model in (zero.reconstruct("expert2"), dict(zero.unified())):
        assert all(torch.equal(model[n], base[n]) for n in base)


@pytest.mark.parametrize("compress", [emr_compress, tall_compress])
def test_order_of_experts_does_not_matter(compress):
    base, models = family(3)
    one, two = compress(base, models, TASKS), compress(base, models[::-1], TASKS[::-1])
    for task in TASKS:
        a, b = one.reconstruct(task), two.reconstruct(task)
        assert all(torch.equal(a[n], b[n]) for n in base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_storage_stays_finite_and_close(dtype):
    base, models = family(3, dtype=dtype)
    masked = emr_compress(base, models, TASKS)
    wide = masked.reconstruct("cars", torch.float32)
    own = masked.reconstruct("cars")
    assert all(own[n].dtype == base[n].dtype for n in base)
    assert all(torch.equal(own[n], wide[n].to(dtype)) for n in FLOATING)
    limit = torch.finfo(dtype).max
    huge = [{"w": torch.tensor([s * limit, -limit], dtype=dtype)} for s in (-0.9, 0.9, 0.8)]
    for task in ("expert1", "expert2"):
        assert torch.isfinite(emr_compress(huge[0], huge[1:]).reconstruct(task)["w"]).all()


def test_a_mask_costs_a_bit():
    base, models = family(3)
    masked = emr_compress(base, models, TASKS)
    count = sum(base[n].numel() for n in FLOATING)
    bits = masked.bits()
    assert bits["masks"] == 3 * count
    assert bits["unified"] == 32 * count
    assert bits["base"] == 32 * count + 64 * base["steps"].numel()
    assert bits["total"] == bits["base"] + bits["unified"] + bits["masks"] + bits["rescalers"] < bits["experts"]
    stored = sum(m.numel() for m in masked.masks.values())
    assert 8 * stored <= 3 * (count + 7 * len(FLOATING))


def test_save_and_load_give_the_same_models(disk, tmp_path):
    base, *models = disk
    masked = emr_compress(base, models, TASKS)
    folder = masked.save(tmp_path / "out", extra_files={"README.md": "hello"})
    assert (folder / "README.md").read_text() == "hello"
    assert (folder / "config.json").exists()
    unified = open_checkpoint(folder)  # an ordinary checkpoint
    merged = merge("emr", base, models)
    assert all(torch.equal(unified[n], merged[n]) for n in base)
    again = MaskedModels.load(folder)
    assert (again.method, again.tasks, again.rescalers) == ("emr", TASKS, masked.rescalers)
    assert again.bits() == masked.bits()
    for task in TASKS:
        one, two = masked.reconstruct(task), again.reconstruct(task)
        assert all(torch.equal(masked.mask(task, n), again.mask(task, n)) for n in FLOATING)
        for name in base:  # the vector is read back as a difference of weights
            torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-6)


def test_lazy_reads_the_experts_again_and_holds_no_vector(disk, tmp_path):
    base, *models = disk
    counting = [Lazy(dict(m)) for m in models]
    masked = tall_compress(base, counting, TASKS, lazy=True)
    assert {m.reads.total() for m in counting} == {len(base)}
    eager = tall_compress(base, models, TASKS)
    one, two = masked.save(tmp_path / "lazy"), eager.save(tmp_path / "eager")
    for name in ("model.safetensors", "masks.safetensors", "masks.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert {m.reads.total() for m in counting} == {len(base) + len(FLOATING)}


def test_bfloat16_on_disk_is_off_by_the_rounding_of_the_weights(tmp_path):
    base, models = family(3, dtype=torch.bfloat16)
    base, *models = on_disk(tmp_path, [base, *models])
    masked = emr_compress(base, models, TASKS)
    stored = MaskedModels.load(masked.save(tmp_path / "out"))
    exact = MaskedModels.load(masked.save(tmp_path / "wide", dtype=torch.float32))
    scale = max(masked.rescalers)
    for name in FLOATING:
        one, two, three = (m.reconstruct("dogs", torch.float32)[name] for m in (masked, exact, stored))
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
        size = torch.maximum(one.abs(), (base[name].float() + masked.vector[name]).abs())
        assert ((one - three).abs() <= (scale * size + base[name].float().abs()) * 2**-8).all()


def test_tied_weights_stay_tied(tmp_path):
    base, models = family(3)
    for model in (base, *models):
        model["head.weight"] = model["linear.weight"]
    masked = emr_compress(base, models, TASKS)
    assert "head.weight" not in masked.masks
    own = masked.reconstruct("cars")
    assert own["head.weight"] is own["linear.weight"]
    without = emr_compress(*({k: v for k, v in m.items() if k != "head.weight"} for m in (base,)),
                           [{k: v for k, v in m.items() if k != "head.weight"} for m in models], TASKS)  # fmt: skip
    assert masked.rescalers == without.rescalers
    assert masked.bits() == without.bits()


def test_a_moved_base_is_found_again_and_another_one_refused(disk, tmp_path):
    base, *models = disk
    folder = emr_compress(base, models, TASKS).save(tmp_path / "out")
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(CheckpointError, match="is gone") as error:
        MaskedModels.load(folder)
    assert "--base" in error.value.hint
    assert MaskedModels.load(folder, tmp_path / "moved").tasks == TASKS
    with pytest.raises(CheckpointError, match="not the base"):
        MaskedModels.load(folder, tmp_path / "cars")


def test_damaged_folders_are_refused(disk, tmp_path):
    base, *models = disk
    folder = emr_compress(base, models, TASKS).save(tmp_path / "out")
    said, masks = json.loads((folder / "masks.json").read_text()), load_file(folder / "masks.safetensors")

    def refuses(match, changes=None, tensors=None):
        broken = tmp_path / "broken"
        shutil.copytree(folder, broken, dirs_exist_ok=True)
        (broken / "masks.json").write_text(json.dumps(said | (changes or {})))
        save_file(masks if tensors is None else tensors, broken / "masks.safetensors")
        with pytest.raises(CheckpointError, match=match):
            MaskedModels.load(broken)

    refuses("format 2", {"format": 2})
    refuses("damaged", {"rescalers": [1.0]})
    refuses("damaged", {"rescalers": [1.0, 1.0, float("nan")]})
    refuses("damaged", {"tasks": ["a", "a", "b"]})
    refuses("damaged", {"tasks": "abc"})
    refuses("damaged", {"base": None})
    refuses("no mask for 'token'|no mask for token", tensors={k: v for k, v in masks.items() if k != "token"})
    refuses("mask of 'token' does not fit", tensors=masks | {"token": masks["token"][:2].clone()})
    refuses("mask of 'other' does not fit", tensors=masks | {"other": masks["token"].clone()})
    (folder / "masks.json").unlink()
    with pytest.raises(CheckpointError, match="so no masks"):
        MaskedModels.load(folder)
    with pytest.raises(CheckpointError, match="so no masks"):
        MaskedModels.load(tmp_path / "nowhere")


def test_mistakes_are_refused(disk, tmp_path):
    base, *models = disk
    with pytest.raises(MergeError, match="no task 'cars2'") as error:
        emr_compress(base, models, TASKS).reconstruct("cars2")
    assert "cars" in error.value.hint
    with pytest.raises(MergeError, match="task names"):
        emr_compress(base, models, ["a", "a", "b"])
    with pytest.raises(MergeError, match="mask_strength"):
        tall_compress(base, models, mask_strength=[0.5])
    with pytest.raises(MergeError, match="1 task weights for 3"):
        emr_compress(base, models, weights=[1.0])
    with pytest.raises(MergeError, match="no expert"):
        emr_compress(base, [])
    with pytest.raises(MergeError, match="not a checkpoint on disk"):
        emr_compress(dict(base), models).save(tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(WriteError, match="not empty"):
        emr_compress(base, models).save(tmp_path / "taken")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "birds", "cars", "dogs", "taken"]


def test_a_failed_write_leaves_nothing(disk, tmp_path, monkeypatch):
    base, *models = disk

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bmm.checkpoint.masked.save_file", full)
    with pytest.raises(WriteError, match="No space left"):
        emr_compress(base, models).save(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "birds", "cars", "dogs"]
