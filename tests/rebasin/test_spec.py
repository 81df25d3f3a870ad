"""Specifications: found by names and by tracing, exact on every architecture, and readable from a file."""

import json

import pytest
import torch
from torch import nn

from bmm.errors import RecipeError
from bmm.rebasin import (
    Group,
    Permutation,
    Site,
    Spec,
    Transformer,
    check_preserved,
    find_spec,
    load_spec,
    match,
    trace_spec,
    transformer_spec,
)
from bmm.zoo import model as zoo_model
from tests.rebasin.networks import Odd, ResNet, mlp, randomise, shapes, state

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def shuffle(spec):
    """A random permutation that leaves no group as it is."""
    for seed in range(1000):
        found = Permutation.random(spec, seed)
        if not any(a.is_identity for a in found.arrangements.values()):
            return found
    raise AssertionError("some group has a single order")


def assert_exact(model, run, spec, tolerance=1e-6):
    """Every group moves, and the outputs do not, in float64; a group left half permuted is noticed."""
    spec.check(shapes(model))
    model.double()
    before, shuffled = state(model), shuffle(spec)
    with torch.no_grad():
        expected = run(model)
        model.load_state_dict(shuffled.apply(before))
        torch.testing.assert_close(run(model), expected, atol=tolerance, rtol=tolerance)
        for group in spec.groups:
            half = group.sites[-1:]
            broken = Group(group.name, group.size, half, {k: group.inner[k] for k in half[0].levels})
            model.load_state_dict(shuffle(Spec((broken,))).apply(before))
            assert (run(model) - expected).abs().max() > 10 * tolerance, group.name
    model.load_state_dict(before)
    model.float()


def assert_recovered(tensors, spec):
    """A model shuffled by any valid permutation is put back bit by bit, by exactly the inverse."""
    shuffled = shuffle(spec)
    found = match(tensors, [shuffled.apply(tensors)], spec)
    inverse = shuffled.inverse()
    for name, arrangement in found.permutations[0].arrangements.items():
        assert torch.equal(arrangement.outer, inverse.arrangements[name].outer), name
        for level, places in arrangement.inner.items():
            assert torch.equal(places, inverse.arrangements[name].inner[level]), (name, level)
    back = found.permutations[0].apply(shuffled.apply(tensors))
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert found.similarity[0][1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("build", "inputs", "groups"),
    [
        (mlp, torch.randn(2, 6), {"0": 11, "2": 9}),
        (ResNet, IMAGES, {"conv": 8, "stage1.0.conv1": 8, "stage1.1.conv1": 8, "stage2.0.conv1": 12,
                          "stage2.0.conv2": 12, "stage2.1.conv1": 12}),
        (Odd, IMAGES, {"squeeze": 4}),
        (lambda: nn.Sequential(zoo_model(), nn.Linear(160, 4)), torch.randn(2, 3, 32, 32), None),
    ],
    ids=["mlp", "resnet", "odd", "vit"],
)  # fmt: skip
def test_traced_networks_are_exact_and_recovered(build, inputs, groups):
    model = randomise(build())
    spec = trace_spec(model, [lambda m: m(inputs)])
    if groups is not None:
        assert {g.name: g.size for g in spec.groups} == groups
    assert_exact(model, lambda m: m(inputs.double()), spec)
    assert_recovered(state(model), spec)


def test_residual_stream_of_a_resnet_is_one_group_with_its_statistics():
    spec = trace_spec(randomise(ResNet()), [lambda m: m(IMAGES)])
    stream = next(g for g in spec.groups if g.name == "conv")
    sites = {(s.tensor, s.axis) for s in stream.sites}
    assert {("stage1.0.conv2.weight", 0), ("stage1.1.conv2.weight", 0), ("stage2.0.down.0.weight", 1)} <= sites
    statistics = {s.tensor for s in stream.sites if not s.matched}
    assert statistics == {f"{n}.running_{k}" for n in ("bn", "stage1.0.bn2", "stage1.1.bn2") for k in ("mean", "var")}
    assert next(s for g in spec.groups for s in g.sites if s.tensor == "fc.weight").width == 4


def test_what_is_not_understood_is_pinned():
    """The gate ties the channels to it; half of them are then read by a grouped convolution: all are fixed."""
    spec = trace_spec(randomise(Odd()), [lambda m: m(IMAGES)])
    permuted = {s.tensor.split(".")[0] for g in spec.groups for s in g.sites}
    assert permuted == {"squeeze", "excite"}


@pytest.mark.parametrize(
    "run",
    [
        lambda m: m[2](m[0](torch.ones(2, 6)).roll(1, -1)),
        lambda m: m[2](m[0](torch.ones(2, 6)).cumsum(-1)),
        lambda m: m[2](m[0](torch.ones(2, 6)) * torch.arange(11.0)),
        lambda m: m[2](torch.tensor(m[0](torch.ones(2, 6)).tolist())),
        lambda m: m[2](m[0](torch.ones(2, 6)).flip(-1)),
        lambda m: m[2](
            nn.functional.max_pool2d(m[0](torch.ones(2, 6))[:, :, None].expand(-1, -1, 5), 3, 1, 1).mean(-1)
        ),
        lambda m: torch.cat([m[0](torch.ones(2, 6)), m[2](m[0](torch.ones(2, 6)))], 1),
    ],
)
def test_order_dependent_operations_fix_the_order(run):
    spec = trace_spec(randomise(mlp()), [run])
    assert "0" not in {g.name for g in spec.groups}


def transformer(kind):
    """Model, config, and a function of its outputs."""
    if kind == "zoo":
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        return zoo_model(), {"heads": 5}, lambda m: m(images)
    if kind == "encoder":
        x = torch.randn(2, 5, 12, dtype=torch.float64)
        layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
        return layer, {"num_heads": 3}, lambda m: m(x)
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
            "vocab_size": 32}  # fmt: skip
    grouped = size | {"num_key_value_heads": 2, "pad_token_id": 0}
    models = {
        "llama": ("LlamaForCausalLM", "LlamaConfig", grouped),
        "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", grouped | {"head_dim": 8}),
        "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", grouped),
        "phi3": ("Phi3ForCausalLM", "Phi3Config", grouped),
        "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", size),
        "bert": ("BertForMaskedLM", "BertConfig", size),
        "opt": ("OPTForCausalLM", "OPTConfig", {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1,
                "num_attention_heads": 4, "vocab_size": 32, "word_embed_proj_dim": 16}),
        "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32,
                 "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}),
    }  # fmt: skip
    name, config, keys = models[kind]
    model = getattr(transformers, name)(getattr(transformers, config)(**keys))
    tokens = torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(0))
    return model, json.loads(model.config.to_json_string()), lambda m: m(input_ids=tokens).logits


@pytest.mark.parametrize("within", ["none", "vo"])
@pytest.mark.parametrize("kind", ["zoo", "encoder", "llama", "qwen3", "olmo2", "phi3", "neox", "bert", "opt", "gpt2"])
def test_transformers_are_exact_and_recovered(kind, within):
    model, config, run = transformer(kind)
    randomise(model)
    canonical = {n: s for n, s in shapes(model).items() if n != "lm_head.weight"}
    spec = transformer_spec(Transformer(canonical, config, within=within))
    kinds = {g.name.rpartition(".")[2] for g in spec.groups}
    assert kinds == ({"mlp"} if (kind, within) == ("neox", "vo") else {"mlp", "heads"})
    assert len(spec.notices) == (2 if (kind, within) == ("neox", "vo") else 0)
    # RMSNorm computes in float32 whatever the model's dtype.
    assert_exact(model, run, spec, 1e-5 if kind in ("llama", "qwen3", "olmo2", "phi3") else 1e-6)
    if kind != "zoo" or within == "none":
        assert_recovered({n: t for n, t in state(model).items() if n in canonical}, spec)


@pytest.mark.parametrize("kind", ["encoder", "gpt2", "bert"])
def test_queries_and_keys_may_be_permuted_inside_heads_without_rotary(kind):
    model, config, run = transformer(kind)
    randomise(model)
    spec = transformer_spec(Transformer(shapes(model), config, within="qkvo"))
    assert {frozenset(g.inner) for g in spec.groups} == {frozenset(), frozenset({"vo", "qk"})}
    assert_exact(model, run, spec)
    assert_recovered(state(model), spec)


def test_rotary_embeddings_forbid_it():
    with pytest.raises(RecipeError, match="rotary"):
        transformer_spec(Transformer({}, {"rope_theta": 1e4}, within="qkvo"))


def test_grouped_queries_move_with_their_key_head():
    spec = transformer_spec(Transformer({
        "m.0.attn.q_proj.weight": (24, 8), "m.0.attn.k_proj.weight": (8, 8), "m.0.attn.v_proj.weight": (8, 8),
        "m.0.attn.o_proj.weight": (8, 24)}, {"num_attention_heads": 6}))  # fmt: skip
    (group,) = spec.groups
    assert (group.size, dict(group.inner)) == (2, {"query": 3})
    assert {s.tensor[9]: (s.axis, s.levels, s.width) for s in group.sites} == {
        "q": (0, ("query",), 4), "k": (0, (), 4), "v": (0, (), 4), "o": (1, ("query",), 4),
    }  # fmt: skip


ATTENTION = {f"m.0.attn.{r}.weight": (8, 8) for r in "qkvo"}


@pytest.mark.parametrize(
    ("extra", "config", "groups", "words"),
    [
        ({}, {}, [], "number of heads"),
        ({}, {"heads": 3}, [], "not 3 heads"),
        ({"m.0.attn.sinks": (2,)}, {"heads": 2}, [], "sinks is not understood"),
        ({"m.0.attn.inner_ln.weight": (8,)}, {"heads": 2}, [], "inner_ln.weight is not understood"),
        ({"m.relative_attention_bias.weight": (32, 2)}, {"heads": 2}, [], "from head to head"),
        ({}, {"heads": 2, "alibi": True}, [], "ALiBi"),
        ({"m.0.mlp.fc1.weight": (16, 8), "m.0.mlp.fc2.weight": (8, 16), "m.0.mlp.norm.weight": (16,)},
         {"heads": 2}, ["m.0.attn.heads"], "norm.weight may act on them"),
        ({"m.0.mlp.fc1.weight": (32, 8), "m.0.mlp.fc2.weight": (8, 16)}, {"heads": 2}, ["m.0.attn.heads"],
         "has 32 outputs"),
    ],
)  # fmt: skip
def test_what_a_block_does_not_explain_leaves_it_alone(extra, config, groups, words):
    spec = transformer_spec(Transformer(ATTENTION | extra, config))
    assert words in " ".join(spec.notices)
    assert [g.name for g in spec.groups] == groups


def test_trace_adds_the_rest_and_the_residual_stream_only_when_asked():
    model = randomise(nn.Sequential(zoo_model(), nn.Linear(160, 4)))
    inputs = torch.randn(2, 3, 32, 32)
    known, run = Transformer(shapes(model), {"heads": 5}), [lambda m: m(inputs)]
    plain = {g.name: g.size for g in find_spec(known, model, run).groups}
    assert {"0.stem.conv1": 32, "0.stem.conv2": 64, "0.blocks.0.attn.heads": 5, "0.blocks.3.mlp": 480}.items() <= (
        plain.items()
    )
    assert len(plain) == 10
    whole = find_spec(known, model, run, residual=True)
    assert {g.name for g in whole.groups} - set(plain) == {"0.stem.patch"}
    assert_exact(model, lambda m: m(inputs.double()), whole)


def test_a_wrong_spec_is_refused_on_the_tasks_inputs():
    model, inputs = randomise(mlp()), torch.randn(3, 6)
    right = trace_spec(model, [lambda m: m(inputs)])
    assert check_preserved(model, state(model), right, [lambda m: m(inputs)]) < 1e-5
    wrong = Spec((Group("0", 11, (Site("0.weight", 0), Site("2.weight", 1))),))  # forgets the bias
    with pytest.raises(RecipeError, match="changes the model's outputs"):
        check_preserved(model, state(model), wrong, [lambda m: m(inputs)])


def test_spec_round_trips_through_yaml_and_repeats(tmp_path):
    model, config, _ = transformer("llama")
    spec = transformer_spec(Transformer(shapes(model), config, within="vo"))
    (tmp_path / "s.yaml").write_text(spec.to_yaml())
    assert load_spec(tmp_path / "s.yaml") == spec
    sites = [{"tensor": "l.{n}.a", "axis": 0, "start": 4, "width": 2}, {"tensor": "l.{n}.b", "axis": 1}]
    repeated = {"groups": [{"name": "l.{n}", "size": 4, "repeat": 2, "sites": sites}]}
    (tmp_path / "r.json").write_text(json.dumps(repeated))
    names = [s.tensor for g in load_spec(tmp_path / "r.json").groups for s in g.sites]
    assert names == ["l.0.a", "l.0.b", "l.1.a", "l.1.b"]


SITES = "sites: [{tensor: a, axis: 0}, {tensor: b, axis: 1}]"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("groups: 3", "one key 'groups'"),
        ("[", "neither YAML nor JSON"),
        ("groups: [{name: x, size: 4}]", "no sites"),
        (f"groups: [{{name: x, size: 4, sties: 1, {SITES}}}]", "sties"),
        (f"groups: [{{name: x, size: four, {SITES}}}]", "'four'"),
        (f"groups: [{{name: x, size: 5, {SITES}}}]", "no 5 entries"),
        (f"groups: [{{name: x, size: 4, {SITES}}}, {{name: x, size: 4, {SITES}}}]", "are called 'x'"),
        (f"groups: [{{name: x, size: 4, {SITES}}}, {{name: y, size: 2, {SITES}}}]", "overlap on axis 0 of a"),
        (f"groups: [{{name: x, size: 4, inner: {{k: 2}}, {SITES}}}]", "levels differ in k"),
        ("groups: [{name: x, size: 4, sites: [{tensor: aa, axis: 0}]}]", "no tensor 'aa'"),
        ("groups: [{name: x, size: 4, sites: [{tensor: a, axis: 0, matched: false}]}]", "no site to match"),
        (f"groups: [{{name: x, size: 4, repeat: 2, {SITES}}}]", "repeat needs {n}"),
        ("groups: []", "nothing to permute"),
    ],
)
def test_mistakes_in_a_spec_are_named(tmp_path, text, words):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_spec(tmp_path / "s.yaml").check({"a": (4, 3), "b": (3, 4)})
    assert words in caught.value.message + caught.value.hint
    assert caught.value.hint
