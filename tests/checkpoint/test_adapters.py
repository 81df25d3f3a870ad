"""PEFT adapters as checkpoints: exact against peft's own merge for every option, strict about what cannot be merged."""

from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bmm.checkpoint import ModelPool, open_checkpoint
from bmm.errors import CheckpointError
from bmm.loading import stored_as
from tests import adapters as make
from tests.checkpoint.adapted import QV, altered, opened

pytest.importorskip("peft")


CONV1D = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}


EVERY = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}


OPTIONS = {
    "lora": ("llama", EVERY),
    "one_target_by_pattern": ("llama", {"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"}),
    "all_linear": ("llama", {"target_modules": "all-linear"}),
    "some_layers": ("llama", QV | {"layers_to_transform": [1]}),
    "some_layers_by_pattern": ("llama", QV | {"layers_to_transform": 0, "layers_pattern": "layers"}),
    "excluded": ("llama", EVERY | {"exclude_modules": ["layers.0.mlp.up_proj", "o_proj"]}),
    "rslora": ("llama", QV | {"use_rslora": True}),
    "patterns": (
        "llama",
        EVERY
        | {
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7, r"^model.layers.0.mlp.down_proj": 4},
            "alpha_pattern": {"v_proj": 9, r"layers\.0\..*q_proj": 3},
            "use_rslora": True,
        },
    ),
    "bias_all": ("llama", QV | {"bias": "all"}),
    "bias_lora_only": ("llama", QV | {"bias": "lora_only"}),
    "lora_bias": ("llama", QV | {"lora_bias": True}),
    "dora": ("llama", EVERY | {"use_dora": True, "use_rslora": True}),
    "modules_to_save": ("llama", QV | {"modules_to_save": ["norm", "lm_head"]}),
    "bias_and_modules_to_save": ("gpt2", CONV1D | {"bias": "all", "modules_to_save": ["ln_f"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding_dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "embedding_and_head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "trained_tokens": ("llama", QV | {"trainable_token_indices": [1, 39]}),
    "trained_tokens_by_name": ("llama", QV | {"trainable_token_indices": {"embed_tokens": [7]}}),
    "conv1d": ("gpt2", CONV1D | {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "conv1d_flag_forgotten": ("gpt2", CONV1D | {"fan_in_fan_out": False}),
    "conv1d_dora": ("gpt2", CONV1D | {"use_dora": True}),
    "conv1d_and_linear": ("gpt2", {"target_modules": ["c_proj", "lm_head"]}),
    "classifier": ("classifier", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    "gaussian": ("llama", QV | {"init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("option", OPTIONS)
def test_an_adapter_is_what_peft_merges(tmp_path, option, dtype):
    kind, options = OPTIONS[option]
    changes = {} if kind == "classifier" else {"tie_word_embeddings": False}
    base = make.save(make.model(kind, dtype=dtype, **changes), tmp_path / "base")
    wrapped = make.adapter(make.model(kind, dtype=dtype, **changes), tmp_path / "adapter", **options)
    if dtype == torch.float64:  # peft keeps adapters in float32 where the base is float32, in the base's type else
        wrapped = wrapped.double()
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        save_file({n: t.double() for n, t in load_file(file).items()}, file)
    expected = make.merged(wrapped)
    start, expert = opened(base, tmp_path / "adapter")
    assert expert.names == start.names
    assert set(expert.changes) == {n for n in start.names if not torch.equal(start[n], expected[n].to(start[n]))}
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    for name in start.names:
        ours, theirs = expert[name], expected[name]
        assert ours.dtype == dtype == expert.info(name).dtype
        assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max()), name
        cuts = (0, ours.numel() // 3, ours.numel() // 2, ours.numel())
        pieces = [expert.piece(name, a, b) for a, b in pairwise(cuts)]
        assert torch.allclose(torch.cat(pieces), ours.flatten(), rtol=tolerance, atol=tolerance), name


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 6, 3)
        self.two = nn.Conv2d(6, 5, 1)
        self.three = nn.Conv2d(6, 6, 3, groups=2)
        self.out = nn.Linear(5, 4)

    def forward(self, x):
        return self.out(self.two(self.one(x)).mean((2, 3)))


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions(tmp_path, dora):
    save_file(Pictures().state_dict(), tmp_path / "base.safetensors")
    net = Pictures()
    net.load_state_dict(load_file(tmp_path / "base.safetensors"))
    options = {"target_modules": ["one", "two", "out"], "use_dora": dora}
    expected = make.merged(make.adapter(net, tmp_path / "adapter", **options))
    _, expert = opened(tmp_path / "base.safetensors", tmp_path / "adapter")
    for name in expert.names:
        assert torch.allclose(expert[name], expected[name], atol=1e-6), name
    assert set(expert.changes) == {"one.weight", "two.weight", "out.weight"}


REFUSED = [
    ({"peft_type": "IA3"}, "a IA3 adapter; only LORA"),
    ({"peft_type": "LOHA"}, "a LOHA adapter"),
    ({"peft_type": "VERA"}, "a VERA adapter"),
    ({"peft_type": "PROMPT_TUNING"}, "a PROMPT_TUNING adapter"),
    ({"use_qalora": True}, "use_qalora=True"),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters="),
    ({"megatron_config": {"a": 1}}, "megatron_config="),
    ({"layer_replication": [[0, 1]]}, "layer_replication="),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens="),
    ({"kasa_config": {"beta": 1e-3}}, "kasa_config="),
    ({"a_new_option": 3}, "a_new_option=3"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    ({"init_lora_weights": "loftq"}, "'loftq'"),
    ({"init_lora_weights": "mica"}, "'mica'"),
    ({"r": 0}, "r is 0"),
    ({"r": 4}, "of rank 4 for a weight"),
    ({"lora_alpha": "8"}, "lora_alpha is '8'"),
    ({"bias": "some"}, "bias is 'some'"),
    ({"rank_pattern": {"(": 2}}, "no pattern"),
    ({"use_dora": True}, "lacks lora_magnitude_vector"),
    ({"lora_bias": True}, "lacks lora_bias"),
    ({"bias": "lora_only"}, "q_proj.bias .* is saved, and it is not"),
    ({"modules_to_save": ["norm"]}, "says that norm is saved, and it is not"),
    ({"target_modules": ["q_proj"]}, "does not target: .*v_proj"),
    ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "no LoRA for 2 modules it targets: .*o_proj"),
    ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    ({"trainable_token_indices": [1, 1]}, "different row numbers"),
]


@pytest.mark.parametrize(
    ("config", "message"), REFUSED, ids=[next(iter(c)) + str(k) for k, (c, _) in enumerate(REFUSED)]
)
def test_what_cannot_be_merged_is_refused_by_name(llama, tmp_path, config, message):
    base, adapter = llama
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(base, altered(adapter, tmp_path / "a", **config))
    assert "\n" not in caught.value.message


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


CHANGED = {
    "no_prefix": ({FIRST.removeprefix("base_model.model.") + ".lora_A.weight": (3, 16)}, "that no LoRA of peft has"),
    "another_part": ({FIRST + ".lora_C.weight": (3, 16)}, "lora_C"),
    "half_a_pair": ({FIRST.replace("q_proj", "k_proj") + ".lora_A.weight": (3, 16)}, "k_proj lacks lora_B"),
    "a_magnitude": ({FIRST + ".lora_magnitude_vector": (16,)}, "against its configuration, lora_magnitude_vector"),
    "another_module": ({FIRST.replace("q_proj", "x_proj") + f".lora_{k}.weight": (3, 3) for k in "AB"}, "x_proj"),
    "another_shape": ({FIRST + ".lora_B.weight": (15, 3)}, "15 x 16 weights"),
    "original_alone": ({FIRST + ".original_module.weight": (16, 16)}, "original_module"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_no_tensor_of_an_adapter_is_left_aside(llama, tmp_path, change):
    tensors, message = CHANGED[change]
    added = {name: torch.ones(shape) for name, shape in tensors.items()}
    with pytest.raises(CheckpointError, match=message):
        opened(llama[0], altered(llama[1], tmp_path / "a", lambda t: t | added))


def test_a_tensor_the_base_lacks_is_an_error_of_the_pool(llama, tmp_path):
    added = {"base_model.model.score.weight": torch.ones(2, 16)}
    folder = altered(llama[1], tmp_path / "a", lambda t: t | added)
    with pytest.raises(CheckpointError, match=r"1 not in the base: score\.weight") as caught:
        ModelPool.open(llama[0], [folder])
    assert 'skip: ["score.*"]' in caught.value.hint
    assert ModelPool.open(llama[0], [folder], skip=["score.*"]).names == open_checkpoint(llama[0]).names


def test_half_precision_is_computed_in_float32(tmp_path):
    base = make.save(make.model("llama", dtype=torch.bfloat16, tie_word_embeddings=False), tmp_path / "base")
    make.adapter(make.model("llama", tie_word_embeddings=False), tmp_path / "a", **QV)
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({n: t.half() for n, t in load_file(file).items()}, file)
    start, expert = opened(base, tmp_path / "a")
    name, parts = "model.layers.0.self_attn.q_proj.weight", load_file(file)
    product = parts[FIRST + ".lora_B.weight"].double() @ parts[FIRST + ".lora_A.weight"].double()
    expected = start[name].double() + 5 / 3 * product
    assert expert[name].dtype == torch.float32
    assert torch.allclose(expert[name].double(), expected, rtol=1e-6, atol=1e-7)
    assert expert["model.norm.weight"].dtype == torch.bfloat16


PREFIXES = {
    "base_without_the_head_s_prefix": ("encoder", "classifier", {"task_type": None}),
    "adapter_without_it": ("bert", "encoder", {}),
}


@pytest.mark.parametrize("case", PREFIXES)
def test_the_base_may_be_saved_from_another_class(tmp_path, case):
    stored, trained, options = PREFIXES[case]
    base = make.save(make.model(stored), tmp_path / "base")
    net = make.model(trained)
    inner = net.bert if trained == "classifier" else net
    weights = {n.removeprefix("bert."): t for n, t in load_file(base / "model.safetensors").items()}
    inner.load_state_dict(weights, strict=False)
    wrapped = make.adapter(net, tmp_path / "a", target_modules=["query", "value"], **options)
    expected = {n.removeprefix("bert."): t for n, t in make.merged(wrapped).items()}
    _start, expert = opened(base, tmp_path / "a")
    assert len(expert.changes) == 4
    for name in expert.changes:
        assert torch.allclose(expert[name], expected[name.removeprefix("bert.")], atol=1e-6), name


def test_a_base_that_transformers_stores_under_older_names(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}

    def net():
        torch.manual_seed(0)
        return transformers.ViTForImageClassification(transformers.ViTConfig(**shape, image_size=16, patch_size=8))

    base = make.save(net(), tmp_path / "base")
    built = net()
    targets = [n.rpartition(".")[2] for n, m in built.named_modules() if isinstance(m, nn.Linear)][:2]
    wrapped = make.adapter(built, tmp_path / "a", target_modules=targets)
    with make.quiet():
        wrapped.merge_and_unload().save_pretrained(tmp_path / "full")
    pool = ModelPool.open(base, [tmp_path / "a", tmp_path / "full"], stored_as=stored_as)
    assert len(pool.experts[0].changes) == 4
    for name in pool.names:
        assert torch.allclose(pool.experts[0][name], pool.experts[1][name], atol=1e-6), name


def test_another_architecture_s_adapter_is_refused_with_names(llama, tmp_path):
    make.adapter(make.model("gpt2"), tmp_path / "a", **CONV1D)
    with pytest.raises(CheckpointError, match=r"modules have no weight in .*: transformer\.h\.0\.attn\.c_attn"):
        opened(llama[0], tmp_path / "a")
