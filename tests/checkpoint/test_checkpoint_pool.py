"""The pool: agreement of base and experts, ties, task vectors, fingerprints, refusal of NaN."""

import pytest
import torch
from safetensors.torch import save_file

from bmm.anchors import merge
from bmm.checkpoint import ModelPool, open_checkpoint
from bmm.errors import CheckpointError


def model(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.weight": torch.randn(3, 4, generator=generator).to(dtype),
        "layer.bias": torch.randn(3, generator=generator).to(dtype),
        "scale": torch.randn((), generator=generator).to(dtype),
        "position_ids": torch.arange(4) + seed,
    }


def on_disk(folder, *models):
    paths = []
    for number, content in enumerate(models):
        paths.append(folder / f"m{number}.safetensors")
        save_file(content, paths[-1])
    return paths


def disagreement(base, expert, **options):
    with pytest.raises(CheckpointError) as caught:
        ModelPool(base, [model(9), expert], **options)
    assert "\n" not in caught.value.message
    assert "expert 'expert2'" in caught.value.message
    return caught.value


def test_disk_and_memory_give_the_same_pool(tmp_path):
    models = [model(0), model(1), model(2, torch.float16)]
    base, *experts = on_disk(tmp_path, *models)
    disk, memory = ModelPool.open(base, experts), ModelPool(models[0], models[1:])
    assert disk.tasks == ("m1", "m2")
    assert memory.tasks == ("expert1", "expert2")
    assert disk.names == memory.names == tuple(sorted(models[0]))
    assert disk.float_names == memory.float_names == ("layer.bias", "layer.weight", "scale")
    assert disk.other_names == memory.other_names == ("position_ids",)
    assert disk.fingerprint() == memory.fingerprint()
    assert len(disk) == 2
    assert disk.shape("layer.weight") == (3, 4)
    for name in disk.float_names:
        expected = torch.stack([m[name].float() - models[0][name] for m in models[1:]])
        assert torch.equal(disk.task_vectors(name), expected)
        assert torch.equal(memory.task_vectors(name), expected)


def test_task_vectors_are_subtracted_in_the_dtype_asked_for():
    base, expert = model(0, torch.bfloat16), model(1, torch.bfloat16)
    vectors = ModelPool(base, [expert]).task_vectors("layer.weight", torch.float64)
    assert vectors.dtype == torch.float64
    assert torch.equal(vectors[0], expert["layer.weight"].double() - base["layer.weight"].double())


def test_task_vectors_of_unknown_or_integer_tensors_are_refused():
    pool = ModelPool(model(0), [model(1)])
    with pytest.raises(CheckpointError, match=r"did you mean layer\.weight"):
        pool.task_vectors("layer.weigth")
    with pytest.raises(CheckpointError, match="no floating tensor"):
        pool.task_vectors("position_ids")


def test_the_fingerprint_sees_every_expert_and_their_order():
    prints = {
        ModelPool(model(b), [model(e) for e in experts]).fingerprint()
        for b, experts in ((0, (1, 2)), (0, (2, 1)), (0, (1,)), (0, (1, 3)), (3, (1, 2)))
    }
    assert len(prints) == 5


def test_every_kind_of_disagreement_is_counted_and_named():
    expert = model(1)
    del expert["layer.bias"]
    expert |= {"layer.weight": torch.zeros(3, 5), "scale": torch.tensor(1)}
    expert |= {f"head.{i}.weight": torch.zeros(2) for i in range(5)}
    message = disagreement(model(0), expert).message
    assert "1 missing: layer.bias" in message
    assert "5 not in the base: head.0.weight, head.1.weight, head.2.weight and 2 more" in message
    assert "1 of another shape: layer.weight base (3, 4), expert (3, 5)" in message
    assert "1 floating in one only: scale base float32, expert int64" in message


def test_the_hint_names_the_skip_that_cures_a_head(tmp_path):
    expert = model(1) | {"classifier.weight": torch.zeros(2, 3), "classifier.bias": torch.zeros(2)}
    assert 'skip: ["classifier.*"]' in disagreement(model(0), expert).hint
    base, path = on_disk(tmp_path, model(0), expert)
    with pytest.raises(CheckpointError, match="2 not in the base"):
        ModelPool.open(base, [path])
    assert ModelPool.open(base, [path], skip=["classifier.*"]).names == tuple(sorted(model(0)))
    with pytest.raises(CheckpointError, match=r"'clasifier\.\*' matches no tensor"):
        ModelPool.open(base, [path], skip=["classifier.*", "clasifier.*"])


def test_the_hint_names_a_prefix_of_a_wrapping_class():
    wrapped = {f"bert.{name}": tensor for name, tensor in model(1).items()} | {"classifier.weight": torch.zeros(2)}
    assert "the expert's names begin with 'bert.'" in disagreement(model(0), wrapped).hint


def test_names_of_tasks_are_checked_and_may_be_given():
    assert ModelPool(model(0), [model(1)], task_names=["cars"]).tasks == ("cars",)
    with pytest.raises(CheckpointError, match="1 task names for 2"):
        ModelPool(model(0), [model(1), model(2)], task_names=["cars"])
    with pytest.raises(CheckpointError, match="not unique"):
        ModelPool(model(0), [model(1), model(2)], task_names=["cars", "cars"])
    with pytest.raises(CheckpointError, match="no experts"):
        ModelPool(model(0), [])


def test_folders_of_one_name_get_numbers_instead(tmp_path):
    for task in ("cars", "dtd"):
        (tmp_path / task / "best").mkdir(parents=True)
        save_file(model(1), tmp_path / task / "best" / "model.safetensors")
    (base,) = on_disk(tmp_path, model(0))
    pool = ModelPool.open(base, [tmp_path / task / "best" for task in ("cars", "dtd")])
    assert pool.tasks == ("expert1", "expert2")


@pytest.mark.parametrize(
    "wrong",
    [{}, [1], {"a": 1}, {1: torch.zeros(1)}, {"a": torch.eye(2).to_sparse()}, {"a": torch.zeros(1).to(torch.cfloat)}],
)
def test_mappings_that_hold_no_tensors_are_refused(wrong):
    with pytest.raises(CheckpointError, match="expert 'expert1'"):
        ModelPool(model(0), [wrong])
    with pytest.raises(CheckpointError, match="the base"):
        ModelPool(wrong, [model(0)])


@pytest.mark.parametrize(
    ("which", "value", "words"),
    [
        (0, float("nan"), r"the base .*m0\.safetensors.*'layer\.bias' holds 1 NaN and 0 Inf of 3"),
        (2, float("-inf"), r"expert 'm2' .*m2\.safetensors.*'layer\.bias' holds 0 NaN and 1 Inf of 3"),
    ],
)
def test_nan_and_inf_are_refused_by_name(which, value, words, tmp_path):
    models = [model(0), model(1), model(2, torch.float16)]
    models[which]["layer.bias"][1] = value
    base, *experts = on_disk(tmp_path, *models)
    with pytest.raises(CheckpointError, match=words):
        ModelPool.open(base, experts).check_finite()


def test_check_finite_reports_progress_over_every_float_tensor():
    steps = []
    ModelPool(model(0), [model(1), model(2)]).check_finite(lambda done, total: steps.append((done, total)))
    assert steps == [(i, 9) for i in range(1, 10)]


# ties


def tied_model(seed, tied=True):
    embed = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    head = embed if tied else embed + 1
    return model(seed) | {"model.embed_tokens.weight": embed, "lm_head.weight": head}


def once(content):
    return {name: tensor for name, tensor in content.items() if name != "lm_head.weight"}


def test_a_tied_weight_is_processed_once_and_put_back():
    pool = ModelPool(tied_model(0), [tied_model(1)])
    assert pool.tied == (("lm_head.weight", "model.embed_tokens.weight"),)
    assert pool.aliases == {"model.embed_tokens.weight": "lm_head.weight"}
    assert "model.embed_tokens.weight" not in pool.names
    restored = pool.with_ties({name: pool.base[name] for name in pool.names})
    assert set(restored) == set(tied_model(0))
    assert restored["model.embed_tokens.weight"] is restored["lm_head.weight"]


def test_a_tie_stored_once_on_one_side_is_no_disagreement(tmp_path):
    torch.save(tied_model(1), tmp_path / "twice.bin")
    twice = open_checkpoint(tmp_path / "twice.bin")
    once_base = ModelPool(once(tied_model(0)), [twice])
    assert set(once_base.experts[0]) == set(once(tied_model(0)))
    once_expert = ModelPool(twice, [once(tied_model(0)), tied_model(2)])
    assert set(once_expert.experts[0]) == set(tied_model(0))
    expected = tied_model(0)["lm_head.weight"] - tied_model(1)["lm_head.weight"]
    assert torch.equal(once_expert.task_vectors("lm_head.weight")[0], expected)
    once_expert.check_finite()
    once_expert.fingerprint()


def test_an_expert_that_unties_is_refused_and_an_untied_base_stays_untied():
    with pytest.raises(CheckpointError, match="tied in the base but differ"):
        ModelPool(tied_model(0), [tied_model(1, tied=False)])
    with pytest.raises(CheckpointError, match=r"1 not in the base: lm_head\.weight"):
        ModelPool(once(tied_model(0)), [tied_model(1, tied=False)])
    pool = ModelPool(tied_model(0, tied=False), [tied_model(1)])
    assert pool.tied == ()
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(pool.float_names)


def test_integer_buffers_that_one_side_saves_are_the_bases(tmp_path):
    weights = {"w": torch.ones(2, 2)}
    ids = {"position_ids": torch.arange(4)}
    save_file(weights | ids, tmp_path / "old.safetensors")
    save_file(weights, tmp_path / "new.safetensors")
    old, new = (open_checkpoint(tmp_path / f"{n}.safetensors") for n in ("old", "new"))
    pool = ModelPool(old, [new])
    assert list(pool.experts[0]) == ["position_ids", "w"]
    assert torch.equal(pool.experts[0]["position_ids"], ids["position_ids"])
    assert torch.equal(merge("average", pool.base, pool.experts)["position_ids"], ids["position_ids"])
    assert ModelPool(new, [old]).names == ("w",)
    assert list(ModelPool(new, [old]).experts[0]) == ["w"]
    with pytest.raises(CheckpointError, match="1 missing: scale"):
        ModelPool(weights | {"scale": torch.ones(1)}, [new])
    with pytest.raises(CheckpointError, match="1 not in the base: q"):
        ModelPool(new, [weights | {"q": torch.ones(2, dtype=torch.int8)}])
