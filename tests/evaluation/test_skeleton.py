"""Models built from a Hugging Face folder: names, and scores equal to transformers' own loading."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import bmm
from bmm.errors import RecipeError
from bmm.evaluation import sizes, skeleton
from bmm.evaluation.skeleton import from_transformers

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL)
    ),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **SMALL)),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=50, num_key_value_heads=1, tie_word_embeddings=True, **SMALL)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    ),
}


def inputs(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "vit":
        return {"pixel_values": torch.randn(12, 3, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(50, (12, 6), generator=generator)}


def last(model, batch):
    logits = model(**batch).logits
    return logits if logits.dim() == 2 else logits[:, -1]


@pytest.mark.parametrize("kind", MODELS)
def test_every_stored_weight_has_a_place_in_the_model(kind, tmp_path):
    torch.manual_seed(0)
    MODELS[kind]().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    model, names = from_transformers(tmp_path)
    assert set(stored) <= set(names)
    own = type(model).from_pretrained(tmp_path).state_dict()
    for name, tensor in stored.items():
        assert torch.equal(own[names[name]], tensor), name


@pytest.mark.parametrize("kind", MODELS)
def test_merges_of_hugging_face_folders(kind, tmp_path):
    """Base and two experts of a real architecture: tuned, written, loaded back by transformers, same logits."""
    torch.manual_seed(0)
    base = MODELS[kind]()
    base.save_pretrained(tmp_path / "base")
    batch, experts, tasks = inputs(kind), {}, []
    for seed, name in enumerate(["a", "b"]):
        expert = MODELS[kind]()
        generator = torch.Generator().manual_seed(seed + 1)
        expert.load_state_dict(
            {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in base.state_dict().items()}
        )
        expert.tie_weights()
        expert.eval().save_pretrained(tmp_path / name)
        experts[name] = str(tmp_path / name)
        with torch.inference_mode():
            labels = last(expert, batch).argmax(-1)
        tasks.append(bmm.Task(name, validation=(batch, labels), calibration=batch, forward=last))
    keys = {"base": str(tmp_path / "base"), "experts": experts}
    result = bmm.tune(keys, tasks=tasks, anchor="wudi_exact", engine="sobol", budget=3, out=str(tmp_path / "run"))
    assert [s.value for s in result.validation["experts"]] == [1.0, 1.0]
    assert {t.status for t in result.trials} == {"completed"}
    merged = type(base).from_pretrained(result.paths["checkpoint"]).eval()
    tensors = bmm.merge(keys | {"anchor": "wudi_exact"}, tasks=tasks, lam=result.hyperparameters.lam,
                        rho=result.hyperparameters.rho)  # fmt: skip
    model, names = from_transformers(tmp_path / "base")
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.state_dict()[names[name]].copy_(tensor)
        model.eval()
        torch.testing.assert_close(last(merged, batch), last(model, batch), rtol=1e-4, atol=1e-5)


def test_folders_without_an_architecture(tmp_path):
    with pytest.raises(RecipeError, match=r"no config\.json"):
        from_transformers(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RecipeError, match="not a JSON object"):
        from_transformers(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": []}))
    with pytest.raises(RecipeError, match="names no architecture"):
        from_transformers(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["NoSuchModel"]}))
    with pytest.raises(RecipeError, match="has no NoSuchModel"):
        from_transformers(tmp_path)


def write_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("kind", MODELS)
def test_a_config_of_a_larger_model_than_is_stored_is_refused_before_it_is_built(kind, tmp_path, monkeypatch):
    MODELS[kind]().save_pretrained(tmp_path)
    width = "n_embd" if kind == "gpt2" else "hidden_size"
    write_config(tmp_path, **{width: 2**15})
    monkeypatch.setattr(sizes, "SLACK", 2**10)
    built = []
    monkeypatch.setattr(skeleton, "_unset_weights", lambda: built.append(kind))
    for outline in (False, True):
        with pytest.raises(RecipeError, match=r"config\.json asks for a model of .* beside it have") as error:
            from_transformers(tmp_path, outline=outline)
        assert "config.json" in error.value.hint
    assert not built


def test_layers_without_end_stop_while_they_are_counted(tmp_path):
    """On the meta device too a layer takes memory, of Python objects."""
    MODELS["vit"]().save_pretrained(tmp_path)
    write_config(tmp_path, num_hidden_layers=10**6, hidden_size=2, num_attention_heads=1, intermediate_size=2)
    with pytest.raises(RecipeError, match=r"asks for a model of over .*; the weights beside it have 5,411 in 40"):
        from_transformers(tmp_path)
    assert not torch.nn.modules.module._global_parameter_registration_hooks


def test_a_model_may_be_twice_what_is_stored(tmp_path, monkeypatch):
    """Tied weights stored once, buffers that are computed: the limit leaves room for both."""
    model = MODELS["llama"]()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(sizes, "SLACK", 0)
    held = sum(t.numel() for t in load_file(tmp_path / "model.safetensors").values())
    built, _ = from_transformers(tmp_path)
    assert held <= sum(t.numel() for t in (*built.parameters(), *built.buffers())) < 2 * held
