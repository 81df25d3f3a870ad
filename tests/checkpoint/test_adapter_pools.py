"""Adapters in a pool, a merge, a study; and what `bmm inspect` says of them."""

import json

import pytest
import torch
from bmm_cli.main import bmm as main_command
from click.testing import CliRunner
from safetensors.torch import load_file

import bmm
from bmm.checkpoint import ModelPool, describe_adapter, open_checkpoint, open_model
from bmm.errors import CheckpointError
from tests import adapters as make
from tests.checkpoint.adapted import altered, opened

# -- tied embeddings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [{"target_modules": ["wte"]}, {"target_modules": ["lm_head"]},
                                    {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}])  # fmt: skip
def test_an_adapter_that_parts_tied_weights_is_refused(tmp_path, target):
    base = make.save(make.model("gpt2"), tmp_path / "base")
    make.adapter(make.model("gpt2"), tmp_path / "a", **target)
    with pytest.raises(CheckpointError, match="tied in the base") as caught:
        opened(base, tmp_path / "a")
    assert "ensure_weight_tying" in caught.value.hint


def test_weights_that_stay_tied_are_one_change(tmp_path):
    base = make.save(make.model("gpt2"), tmp_path / "base")
    wrapped = make.adapter(
        make.model("gpt2"), tmp_path / "a", target_modules=["c_attn", "wte", "lm_head"], ensure_weight_tying=True
    )
    expected = wrapped.base_model.model.transformer.wte.get_delta_weight("default")
    start, expert = opened(base, tmp_path / "a")
    assert "lm_head.weight" not in expert
    assert torch.allclose(expert["transformer.wte.weight"] - start["transformer.wte.weight"], expected, atol=1e-6)
    tokens = make.adapter(make.model("gpt2"), tmp_path / "t", target_modules=["c_attn"], trainable_token_indices=[4])
    _, expert = opened(base, tmp_path / "t")
    assert torch.equal(expert["transformer.wte.weight"], make.merged(tokens)["transformer.wte.weight"])


# -- in a pool, a merge, a study ----------------------------------------------------------------------------------


def test_fingerprints_tell_adapters_apart_and_do_no_arithmetic(llama, tmp_path, monkeypatch):
    base, adapter = llama
    same = altered(adapter, tmp_path / "same")
    stronger = altered(adapter, tmp_path / "stronger", lora_alpha=6)
    other = altered(adapter, tmp_path / "other", lambda t: {n: 2 * x for n, x in t.items()})
    monkeypatch.setattr(torch.Tensor, "addmm_", None)
    prints = [opened(base, folder)[1].fingerprint() for folder in (adapter, same, stronger, other)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_a_full_and_an_adapter_expert_merge_together(llama, tmp_path):
    base, adapter = llama
    full = make.save(make.model("llama", seed=2, tie_word_embeddings=False), tmp_path / "full")
    keys = {"base": str(base), "anchor": "task_arithmetic", "knobs": {"scale": 0.5}}
    out = bmm.merge(**keys, experts={"a": str(adapter), "b": str(full)}, out=tmp_path / "out")
    expected = bmm.merge(**keys, experts={"a": str(_full(base, adapter, tmp_path / "a")), "b": str(full)})
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name


def _full(base, adapter, folder):
    """The full model of an adapter, written by peft."""
    import transformers
    from peft import PeftModel

    with make.quiet():
        model = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter)
        model.merge_and_unload().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("anchor", ["average", "ties", "dare_ta", "tsv", "iso_c", "breadcrumbs", "della", "pcb"])
def test_every_kind_of_anchor_takes_adapters(llama, tmp_path, anchor):
    base, adapter = llama
    other = altered(adapter, tmp_path / "other", lambda t: {n: x.flip(0) for n, x in t.items()})
    pool = ModelPool.open(base, [adapter, other])
    memory = [{n: e[n] for n in e} for e in pool.experts]
    for (name, ours), (_, theirs) in zip(
        bmm.anchors.merge_stream(anchor, pool.base, pool.experts),
        bmm.anchors.merge_stream(anchor, pool.base, memory),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-5), name


def test_an_adapter_that_names_another_base_gives_a_notice(llama, tmp_path):
    folder = altered(llama[1], tmp_path / "a", base_model_name_or_path=str(tmp_path))
    assert ModelPool.open(llama[0], [folder]).notices == [f"{folder} was trained on {tmp_path}, and the base given is "
                                                          f"{llama[0]}"]  # fmt: skip
    folder = altered(llama[1], tmp_path / "b", base_model_name_or_path="some/hub-model")
    assert ModelPool.open(llama[0], [folder]).notices == []


def test_where_the_weights_lie(llama, tmp_path):
    base, adapter = llama
    expected = opened(base, adapter)[1]["model.layers.0.self_attn.q_proj.weight"]
    by_file = opened(base, adapter / "adapter_model.safetensors")[1]
    assert torch.equal(by_file["model.layers.0.self_attn.q_proj.weight"], expected)
    pickled = altered(adapter, tmp_path / "bin")
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    assert torch.equal(opened(base, pickled)[1]["model.layers.0.self_attn.q_proj.weight"], expected)
    (pickled / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"without adapter_model\.safetensors"):
        opened(base, pickled)
    both = altered(adapter, tmp_path / "both")
    (both / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="holds an adapter and a full model"):
        opened(base, both)
    assert opened(base, both / "model.safetensors")[1].fingerprint() == open_checkpoint(base).fingerprint()
    with pytest.raises(CheckpointError, match="no model without its base"):
        open_model(adapter)


def test_an_adapter_is_described_without_its_base(llama):
    found = describe_adapter(llama[1])
    assert found["kind"] == "LoRA"
    assert found["ranks"] == [3]
    assert found["modules"] == 4
    assert found["scalings"] == [pytest.approx(5 / 3, abs=1e-6)]


def inspect(*arguments):
    return CliRunner().invoke(main_command, ["inspect", *map(str, arguments)])


def test_inspect_shows_adapters_with_and_without_their_base(llama, tmp_path):
    base, adapter = llama
    alone = inspect(adapter)
    assert alone.exit_code == 0
    assert "LoRA, rank 3, scaling 1.66667, 4 modules" in alone.output
    folder = altered(adapter, tmp_path / "a", base_model_name_or_path=str(tmp_path))
    found = inspect(base, folder)
    assert f"{folder}: LoRA, rank 3" in found.output
    assert f"agree in {len(open_checkpoint(base).names)} tensors" in found.output
    assert f"note: {folder} was trained on" in found.output
    data = json.loads(inspect(base, folder, "--json").stdout)
    assert data["checkpoints"][1]["adapter"]["modules"] == 4


def test_a_study_of_adapters_runs_is_saved_and_evaluated(llama, tmp_path):
    base, adapter = llama
    tasks = tmp_path / "tasks.py"
    tasks.write_text(TASKS)
    other = altered(adapter, tmp_path / "other", lambda t: {n: x.flip(0) for n, x in t.items()})
    keys = {"base": str(base), "experts": {"a": str(adapter), "b": str(other)}, "tasks": f"{tasks}:tasks"}
    result = bmm.tune(**keys, anchor="task_arithmetic", engine="sobol", budget=4, out=str(tmp_path / "run"))
    assert len(result.trials) == 4
    written = bmm.save(tmp_path / "run", 2, out=tmp_path / "saved")
    assert open_checkpoint(written).names == open_checkpoint(base).names
    scores = bmm.evaluate(adapter, keys, split="validation")
    assert next(s.value for s in scores) == next(s.value for s in result.validation["experts"] if s.task == "a")


TASKS = """
import torch
import bmm

def tasks():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(40, (24, 6), generator=generator)
    return [
        bmm.Task(name, validation=(x, x[:, k] % 2), calibration=x[:8], forward=lambda net, x: net(x).logits[:, -1, :2])
        for k, name in enumerate("ab")
    ]
"""
