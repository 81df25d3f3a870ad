"""A merge written as an adapter: what peft makes of it, how exact it is, what is refused."""

import json

import pytest
import torch
from bmm_cli.main import bmm as main_command
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import bmm
from bmm.checkpoint import ModelPool, open_checkpoint
from bmm.errors import RecipeError, WriteError
from bmm.linalg import truncated
from bmm.loading import stored_as
from tests import adapters as make

pytest.importorskip("peft")
IDS = torch.arange(12).reshape(2, 6)
KINDS = {
    "llama": ({"tie_word_embeddings": False}, {"target_modules": ["q_proj", "up_proj", "embed_tokens", "lm_head"]}),
    "gpt2": ({}, {"target_modules": ["c_attn", "c_proj"], "bias": "lora_only", "modules_to_save": ["ln_f"]}),
    "bert": ({}, {"target_modules": ["query", "dense"], "bias": "all"}),
}


def family(kind, folder):
    """A base and two adapters of rank 3 on it."""
    changes, options = KINDS[kind]
    base = make.save(make.model(kind, **changes), folder / "base")
    for seed, name in enumerate("ab", 1):
        make.adapter(make.model(kind, **changes), folder / name, seed, **options)
    return {"base": str(base), "experts": {n: str(folder / n) for n in "ab"}, "anchor": "task_arithmetic"}


def logits(base, adapter=None):
    import transformers
    from peft import PeftModel

    config = json.loads((base / "config.json").read_text())
    with make.quiet():
        net = getattr(transformers, config["architectures"][0]).from_pretrained(base)
        net = net if adapter is None else PeftModel.from_pretrained(net, adapter)
        return net.eval()(IDS).logits.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_of_low_rank_is_written_exactly(tmp_path, kind):
    keys = family(kind, tmp_path)
    full = bmm.merge(keys, out=tmp_path / "full")
    adapter = bmm.merge(keys, out=tmp_path / "adapter", adapter_rank=6)
    found = json.loads((adapter / "truncation.json").read_text())
    assert found["rank"] <= 6
    assert found["error"] < 1e-5
    assert all(entry["error"] < 1e-5 for entry in found["modules"].values())
    assert torch.allclose(logits(tmp_path / "base", adapter), logits(full), atol=2e-5)
    again = ModelPool.open(tmp_path / "base", [adapter]).experts[0]  # and bmm reads it as peft does
    for name, tensor in load_file(full / "model.safetensors").items():
        assert torch.allclose(again[name], tensor, atol=1e-5), name


def test_a_merge_of_higher_rank_is_truncated_as_an_svd_is(tmp_path):
    keys = family("llama", tmp_path)
    full = bmm.merge(keys, out=tmp_path / "full")
    adapter = bmm.merge(keys, out=tmp_path / "adapter", adapter_rank=2)
    found = json.loads((adapter / "truncation.json").read_text())
    base, merged = load_file(tmp_path / "base" / "model.safetensors"), load_file(full / "model.safetensors")
    lost = size = 0.0
    for name in found["modules"]:
        u, s, v = torch.linalg.svd((merged[name] - base[name]).double(), full_matrices=False)
        merged[name] = base[name] + ((u[:, :2] * s[:2]) @ v[:2]).float()
        assert found["modules"][name]["error"] == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-4)
        lost, size = lost + float(s[2:].square().sum()), size + float(s.square().sum())
    assert found["error"] == pytest.approx((lost / size) ** 0.5, rel=1e-4)
    assert found["energy"] == pytest.approx(1 - lost / size, rel=1e-4)
    assert found["error"] > 0.1
    save_file(merged, full / "model.safetensors", {"format": "pt"})
    assert torch.allclose(logits(tmp_path / "base", adapter), logits(full), atol=2e-5)
    card = (adapter / "README.md").read_text()
    assert "of rank 2 on the base: it keeps" in card
    assert f"| {max(found['modules'], key=lambda n: found['modules'][n]['error'])} | 2 |" in card
    assert not (adapter / "model.safetensors").exists()


def test_names_that_transformers_stores_otherwise_come_out_as_peft_knows_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    with make.quiet():
        net = transformers.ViTForImageClassification(transformers.ViTConfig(**shape, image_size=16, patch_size=8))
        base = make.save(net, tmp_path / "base")
    own = dict(load_file(base / "model.safetensors").items())
    moved = {n: t + 0.1 * torch.outer(torch.ones(len(t)), torch.arange(t.shape[1])) if "dense" in n and t.dim() == 2
             else t for n, t in own.items()}  # fmt: skip
    save_file(moved, tmp_path / "expert.safetensors", {"format": "pt"})
    keys = {"base": str(base), "experts": {"a": str(tmp_path / "expert.safetensors")}, "anchor": "average"}
    adapter = bmm.merge(keys, out=tmp_path / "adapter", adapter_rank=1)
    from peft import PeftModel

    with make.quiet():
        wrapped = PeftModel.from_pretrained(net, adapter).merge_and_unload()
        make.save(wrapped, tmp_path / "full")
    again = ModelPool.open(base, [adapter, tmp_path / "full"], stored_as=stored_as)
    for name, tensor in moved.items():
        assert torch.allclose(again.experts[0][name], tensor, atol=1e-5), name
        assert torch.allclose(again.experts[1][name], tensor, atol=1e-5), name


def test_what_no_adapter_holds_is_refused_by_name_and_nothing_is_written(tmp_path):
    tensors = {"lin.weight": torch.randn(6, 5), "token": torch.zeros(1, 5)}
    save_file(tensors, tmp_path / "base.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, tmp_path / "a.safetensors")
    keys = {"base": str(tmp_path / "base.safetensors"), "experts": {"a": str(tmp_path / "a.safetensors")}}
    with pytest.raises(WriteError, match="token changes, and no adapter can hold it"):
        bmm.merge(keys, anchor="average", out=tmp_path / "out", adapter_rank=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "base.safetensors"]
    with pytest.raises(WriteError, match="changes nothing"):
        bmm.merge(keys, anchor="task_arithmetic", knobs={"scale": 0.0}, out=tmp_path / "out", adapter_rank=2)
    with pytest.raises(RecipeError, match="adapter_rank"):
        bmm.merge(keys, anchor="average", adapter_rank=2)
    with pytest.raises(RecipeError, match="no adapter"):
        bmm.merge(keys, anchor="emr", adapter_rank=2, masks=True, out=tmp_path / "out")


def test_the_command_line_writes_adapters_and_says_what_they_keep(family, tmp_path):
    recipe = family.yaml(tmp_path / "r.yaml")
    out = tmp_path / "out"
    run = CliRunner().invoke(main_command, ["merge", "--recipe", str(recipe), "--anchor", "average", "--out", str(out),
                                            "--adapter-rank", "8", "--json", "--quiet"])  # fmt: skip
    assert run.exit_code == 0, run.output
    data = json.loads(run.stdout)
    assert 0 < data["adapter"]["error"] < 0.5
    assert set(data["adapter"]["modules"]) == {f"{n}.weight" for n in ("conv", "q", "k", "fc1", "out")}
    expected = bmm.merge(family.recipe(anchor="average"))
    merged = ModelPool.open(family.base, [out]).experts[0]
    assert torch.allclose(merged["norm.weight"], expected["norm.weight"])
    assert torch.allclose(merged["q.bias"], expected["q.bias"])


def test_a_study_is_saved_as_an_adapter(study, family, tmp_path):
    recipe = study.recipe | {"adapter_rank": 40, "out": str(tmp_path / "run"), "budget": 2}
    result = bmm.tune(recipe)
    found = json.loads((tmp_path / "run" / "model" / "truncation.json").read_text())
    assert found["error"] < 1e-5
    scores = bmm.evaluate(result.paths["checkpoint"], family.recipe())
    assert [s.value for s in scores] == [s.value for s in result.test["best"]]
    saved = bmm.save(study.paths["study"], 3, out=tmp_path / "saved", adapter_rank=4)
    assert json.loads((saved / "truncation.json").read_text())["rank"] == 4
    assert open_checkpoint(family.base).names == ModelPool.open(family.base, [saved]).experts[0].names


@pytest.mark.parametrize("shape", [(90, 150), (150, 90)])
def test_truncation_by_subspace_iteration_is_nearly_the_svd_s(shape):
    generator = torch.Generator().manual_seed(3)
    u, _ = torch.linalg.qr(torch.randn(shape[0], 90, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(shape[1], 90, generator=generator, dtype=torch.float64))
    values = torch.arange(1, 91, dtype=torch.float64).pow(-0.5)  # a slow decay, the hard case
    matrix = (u * values) @ v.mT
    left, s, right = truncated(matrix, 8)
    error = float((matrix - (left * s) @ right.mT).norm())
    assert error <= 1.002 * float(values[8:].norm())
    assert torch.equal(truncated(matrix, 8)[0], left)
    left, s, right = truncated((u[:, :5] * values[:5]) @ v[:, :5].mT, 8)  # of rank 5: exact, and no rounding kept
    assert len(s) == 5
    assert torch.allclose((left * s) @ right.mT, (u[:, :5] * values[:5]) @ v[:, :5].mT, atol=1e-12)
