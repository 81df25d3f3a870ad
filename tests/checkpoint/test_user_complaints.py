"""What users of other merging tools reported, each with a test that it does not happen here."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import bmm
from bmm.checkpoint import ModelPool, open_checkpoint
from bmm.errors import CheckpointError
from tests import adapters as make
from tests.checkpoint.test_vocabulary import HEAD, row, rows, write

TABLE = "model.embed_tokens.weight"


def test_a_tied_model_that_stores_no_lm_head_merges(tmp_path):
    """mergekit 350, 424, 615: KeyError 'lm_head.weight' for models whose head is the embedding, stored once."""
    folders = [make.save(make.model("llama", seed, tie_word_embeddings=True), tmp_path / n)
               for seed, n in enumerate(("base", "a", "b"))]  # fmt: skip
    assert "lm_head.weight" not in load_file(folders[0] / "model.safetensors")
    out = bmm.merge(base=str(folders[0]), experts=list(map(str, folders[1:])), anchor="average", out=tmp_path / "out")
    a, b = (load_file(f / "model.safetensors")[TABLE] for f in folders[1:])
    assert torch.allclose(load_file(out / "model.safetensors")[TABLE], (a + b) / 2, atol=1e-6)
    from transformers import AutoModelForCausalLM

    with make.quiet():
        net = AutoModelForCausalLM.from_pretrained(out)
    assert net.lm_head.weight.data_ptr() == net.model.embed_tokens.weight.data_ptr()


def test_an_expert_that_stores_the_tied_head_twice_merges_with_one_that_does_not(tmp_path):
    """mergekit 464: some fine-tunes of a tied model store lm_head.weight as well, and the two did not merge."""
    base, once = write(tmp_path / "base", tied=True), write(tmp_path / "once", offset=2.0, tied=True)
    twice = write(tmp_path / "twice", offset=4.0, tied=True)
    stored = load_file(twice / "model.safetensors")
    save_file(stored | {HEAD: stored[TABLE].clone()}, twice / "model.safetensors", {"format": "pt"})
    merged = bmm.merge(base=str(base), experts=[str(once), str(twice)], anchor="average")
    assert torch.equal(merged[TABLE], rows(["<unk>", "a", "b", "c", "d"], 0, 3.0))
    save_file(stored | {HEAD: stored[TABLE] + 1}, twice / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="lm_head"):  # an untied head would be lost in silence
        ModelPool.open(base, [once, twice])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("anchor", ["average", "ties", "tsv"])
def test_the_dtype_asked_for_is_written_and_said_in_the_config(tmp_path, dtype, anchor):
    """mergekit 604: whatever dtype the configuration gave, the merge came out in float32."""
    folders = [make.save(make.model("llama", seed, torch.bfloat16), tmp_path / str(seed)) for seed in range(3)]
    keys = {"base": str(folders[0]), "experts": [str(f) for f in folders[1:]], "anchor": anchor}
    out = bmm.merge(**keys, dtype=dtype, out=tmp_path / "out")
    assert {str(t.dtype) for t in load_file(out / "model.safetensors").values()} == {f"torch.{dtype}"}
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    same = bmm.merge(**keys, out=tmp_path / "same")
    assert {t.dtype for t in load_file(same / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("anchor", ["average", "task_arithmetic", "ties", "slerp", "della", "dare_ties", "model_stock"])
def test_half_precision_weights_near_the_limit_merge_without_nan(tmp_path, anchor):
    """mergekit 704: merges computed in float16 gave NaN where sums and squares passed 65504."""
    generator = torch.Generator().manual_seed(0)
    base = {"w.weight": 50000 * torch.rand(8, 8, generator=generator)}
    paths = []
    for k in range(3):
        paths.append(str(tmp_path / f"{k}.safetensors"))
        noise = 50 * torch.randn(8, 8, generator=generator) * bool(k)
        save_file({"w.weight": (base["w.weight"] + noise).half()}, paths[-1])
    merged = bmm.merge(base=paths[0], experts=paths[1:], anchor=anchor)["w.weight"]
    assert merged.dtype == torch.float32
    assert bool(torch.isfinite(merged).all())
    assert float((merged - base["w.weight"]).abs().max()) < 2000


OPTIONS = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "lora_bias": {"lora_bias": True}}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_single_adapter_merged_alone_is_itself(tmp_path, option):
    """peft 3761 (and 3004): add_weighted_adapter of one adapter with weight 1 was another one, without an error, for
    rsLoRA (sqrt(r) too strong), DoRA and lora_bias."""
    pytest.importorskip("peft")
    base = make.save(make.model("llama", tie_word_embeddings=False), tmp_path / "base")
    net = make.model("llama", tie_word_embeddings=False)
    options = {"target_modules": ["q_proj", "down_proj"], "r": 4} | OPTIONS[option]
    if option == "lora_bias":
        options["target_modules"] = ["q_proj"]  # down_proj has no bias to add to
    expected = make.merged(make.adapter(net, tmp_path / "a", **options))
    merged = bmm.merge(base=str(base), experts={"a": str(tmp_path / "a")}, anchor="average")
    for name, tensor in merged.items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name
    if option == "rslora":  # a factor of sqrt(r) = 2 would show
        moved = merged["model.layers.0.self_attn.q_proj.weight"] - load_file(base / "model.safetensors")[
            "model.layers.0.self_attn.q_proj.weight"]  # fmt: skip
        parts = load_file(tmp_path / "a" / "adapter_model.safetensors")
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
        product = parts[f"{key}B.weight"] @ parts[f"{key}A.weight"]
        assert float(moved.norm() / product.norm()) == pytest.approx(5 / math.sqrt(4), rel=1e-4)


def test_kasa_is_refused_rather_than_merged_wrong(tmp_path):
    """peft 3761: and for KaSA, which also takes singular values out of the base."""
    pytest.importorskip("peft")
    base = make.save(make.model("llama"), tmp_path / "base")
    make.adapter(make.model("llama"), tmp_path / "a", target_modules=["q_proj"])
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"kasa_config": {"beta": 1e-4}}))
    with pytest.raises(CheckpointError, match="kasa_config"):
        bmm.merge(base=str(base), experts={"a": str(tmp_path / "a")}, anchor="average")


def test_a_lora_on_one_side_of_tied_weights_does_not_change_the_other(tmp_path):
    """peft 2018: merging a LoRA of lm_head into a tied model changed the embedding too, with a warning at most."""
    pytest.importorskip("peft")
    base = make.save(make.model("llama", tie_word_embeddings=True), tmp_path / "base")
    make.adapter(make.model("llama", tie_word_embeddings=True), tmp_path / "a", target_modules=["lm_head"])
    with pytest.raises(CheckpointError, match="tied in the base: the two would part"):
        bmm.merge(base=str(base), experts={"a": str(tmp_path / "a")}, anchor="average")


def test_vocabularies_that_differ_by_a_few_rows_merge_by_token(tmp_path):
    """fusion_bench 215: embed_tokens [128320, 3072] against [128256, 3072] was an error, or 'Reinit due to size
    mismatch': the expert had one more token, and its rows were padded to a multiple of 64."""
    base, plain = write(tmp_path / "base"), write(tmp_path / "plain", offset=2.0)
    math_expert = write(tmp_path / "math", added=["<pad>"], padding=2, offset=4.0)
    keys = {"base": str(base), "experts": [str(plain), str(math_expert)], "anchor": "average"}
    with pytest.raises(CheckpointError, match="1 tokens the base lacks: '<pad>'"):
        bmm.merge(**keys)
    words = ["<unk>", "a", "b", "c", "d"]
    assert torch.equal(bmm.merge(**keys, vocabulary="base")[TABLE], rows(words, 0, 3.0))
    union = bmm.merge(**keys, vocabulary="union")[TABLE]
    assert torch.equal(union, torch.cat([rows(words, 0, 3.0), row("<pad>", 4.0)[None]]))


def test_an_adapter_that_added_tokens_is_tuned_and_opens_with_its_tokenizer(tmp_path):
    """LLaMA-Factory 3125: embeddings resized for new tokens lie with the adapter: size mismatch when it is merged."""
    pytest.importorskip("peft")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{k}": k for k in range(40)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")
    base = make.save(make.model("llama", tie_word_embeddings=False), tmp_path / "base")
    fast.save_pretrained(base)
    fast.add_tokens(["<call>"], special_tokens=True)
    net = make.model("llama", tie_word_embeddings=False)
    net.resize_token_embeddings(41, mean_resizing=False)
    make.adapter(net, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    fast.save_pretrained(tmp_path / "a")
    (tmp_path / "tasks.py").write_text(TASKS)
    result = bmm.tune(
        base=str(base), experts={"a": str(tmp_path / "a")}, tasks=f"{tmp_path}/tasks.py:tasks", vocabulary="union",
        anchor="average", grams="data", engine="sobol", budget=3, out=str(tmp_path / "run"),
    )  # fmt: skip
    with make.quiet():
        merged = AutoModelForCausalLM.from_pretrained(result.paths["checkpoint"])
        known = PreTrainedTokenizerFast.from_pretrained(result.paths["checkpoint"])
    own = load_file(tmp_path / "a" / "adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]
    assert known("w3 <call>")["input_ids"] == [3, 40]
    assert torch.allclose(merged.get_input_embeddings().weight[40], own[40])
    assert open_checkpoint(result.paths["checkpoint"]).info("lm_head.weight").shape == (41, 16)


TASKS = """
import torch
import bmm

def tasks():
    x = torch.randint(41, (24, 6), generator=torch.Generator().manual_seed(0))
    forward = lambda net, x: net(x).logits[:, -1, :2]
    return [bmm.Task("a", validation=(x, x[:, 0] % 2), calibration=x[:8], forward=forward)]
"""
