"""PEFT adapters as checkpoints: exact against peft's own merge for every option, strict about what cannot be merged."""

import json
from itertools import pairwise

import pytest
import torch
from bmm_cli.main import bmm as main_command
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

import bmm
from bmm.checkpoint import ModelPool, describe_adapter, open_checkpoint, open_model
from bmm.errors import CheckpointError
from bmm.loading import stored_as
from tests import adapters as make

pytest.importorskip("peft")
CONV1D = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
QV = {"target_modules": ["q_proj", "v_proj"]}
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


def opened(base, adapter, **options):
    start = open_checkpoint(base)
    return start, open_model(adapter, start, **options)


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


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folders of a base and of one adapter on it."""
    folder = tmp_path_factory.mktemp("llama")
    base = make.save(make.model("llama", tie_word_embeddings=False), folder / "base")
    make.adapter(make.model("llama", tie_word_embeddings=False), folder / "adapter", **QV)
    return base, folder / "adapter"


def altered(adapter, folder, tensors=lambda t: t, **config):
    """A copy of an adapter with other settings or tensors."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps(json.loads((adapter / "adapter_config.json").read_text()) | config)
    )
    save_file(tensors(load_file(adapter / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    return folder


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
