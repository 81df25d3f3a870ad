"""Grams from hooks against Grams of activations written down by hand, for every kind of module."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bmm.errors import GramError
from bmm.grams import collect


def seeded(build, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def batches_of(*shape, sizes=(3, 1, 4), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=g) for n in sizes]


def plain(model, batch):
    return model(batch)


def gram(x, bias=True):
    rows = x.detach().double().reshape(-1, x.shape[-1])
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1) if bias else rows
    return rows.T @ rows / len(rows)


def check(found, name, x, bias=True):
    torch.testing.assert_close(found.for_weight(name), gram(x, bias), atol=1e-6, rtol=1e-5)
    key = found.key_of[name]
    assert found.count[key] == x[..., 0].numel()
    assert found.has_bias[key] is bias


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False)
        self.spare = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc2(self.norm(self.fc1(x).relu()))


@pytest.mark.parametrize("shape", [(5,), (6, 5)])
def test_linear(shape):
    model, batches = seeded(MLP), batches_of(*shape)
    found = collect(model, plain, batches)
    x = torch.cat(batches)
    check(found, "fc1.weight", x)
    check(found, "fc2.weight", model.norm(model.fc1(x).relu()), bias=False)
    assert found.bias_of == {"fc1.weight": "fc1.bias"}
    assert found.layout == {"fc1.weight": "linear", "fc2.weight": "linear"}
    assert found.grams["fc1.weight"].dtype == torch.float64
    assert found.skipped == {"spare.weight": "its module never ran on the calibration inputs"}
    with pytest.raises(GramError, match="never ran"):
        found.for_weight("spare.weight")
    with pytest.raises(GramError, match=r"no weight fc3.weight") as caught:
        found.for_weight("fc3.weight")
    assert "did you mean" in caught.value.hint


def test_without_bias_and_restricted_to_names():
    model, batches = seeded(MLP), batches_of(5)
    found = collect(model, plain, batches, names={"fc1.weight"}, bias=True)
    assert list(found.grams) == ["fc1.weight"]
    check(found, "fc1.weight", torch.cat(batches), bias=False)  # its bias was not asked for
    assert found.skipped == {}
    check(collect(model, plain, batches, names={"fc1.weight", "fc1.bias"}), "fc1.weight", torch.cat(batches))
    found = collect(model, plain, batches, bias=False)
    check(found, "fc1.weight", torch.cat(batches), bias=False)
    assert found.bias_of == {}
    with pytest.raises(GramError, match=r"no parameter fc9.weight"):
        collect(model, plain, batches, names={"fc9.weight"})


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 2), "bias": False},
    "same": {"kernel_size": 4, "padding": "same"},  # an even kernel pads one side more
    "valid": {"kernel_size": 3, "padding": "valid"},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": "same", "padding_mode": "circular", "dilation": (1, 2)},
    "patches": {"kernel_size": 4, "stride": 4},
}


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_conv2d(kind):
    options = CONVOLUTIONS[kind]
    model = nn.Sequential(seeded(lambda: nn.Conv2d(2, 5, **options)))
    batches = batches_of(2, 8, 9)
    found = collect(model, plain, batches)
    taps = model[0].weight[0].numel()
    probe = nn.Conv2d(2, taps, **options)  # one-hot kernels: the convolution itself writes its patches down
    probe.weight.data = torch.eye(taps).reshape(taps, *model[0].weight.shape[1:])
    if probe.bias is not None:
        probe.bias.data.zero_()
    check(found, "0.weight", probe(torch.cat(batches)).movedim(1, -1), bias=options.get("bias", True))
    assert found.layout == {"0.weight": "conv2d"}


def test_conv2d_without_a_batch_dimension_and_in_small_chunks(monkeypatch):
    model, batch = nn.Sequential(seeded(lambda: nn.Conv2d(2, 3, 3))), batches_of(2, 6, 6)[0]
    whole = collect(model, plain, [batch])
    single = collect(model, plain, list(batch))
    torch.testing.assert_close(single.for_weight("0.weight"), whole.for_weight("0.weight"))
    assert single.count == whole.count
    monkeypatch.setattr("bmm.grams.sites.PATCH_ELEMENTS", 1)
    torch.testing.assert_close(collect(model, plain, [batch]).for_weight("0.weight"), whole.for_weight("0.weight"))


class Twin(nn.Module):
    """Convolutions on one input: two cut the same patches, one others."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 5, 3, padding=1)
        self.c = nn.Conv2d(2, 3, 3)
        self.grouped = nn.Conv2d(2, 4, 3, groups=2)

    def forward(self, x):
        return self.a(x), self.b(x), self.c(x), self.grouped(x)


def test_convolutions_share_where_patches_agree_and_groups_are_skipped():
    found = collect(seeded(Twin), plain, batches_of(2, 6, 6))
    assert found.key_of == {"a.weight": "a.weight", "b.weight": "a.weight", "c.weight": "c.weight"}
    assert found.skipped == {"grouped.weight": "convolution in 2 groups"}


class Attention(nn.Module):
    """q, k, v on one tensor; v without bias; k2 on an equal tensor that is another object; q2 after a change."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(4, 4, bias=False)
        self.k2, self.q2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = x * 1.0
        out = self.q(x).sum() + self.k(x).sum() + self.v(x).sum() + self.k2(x.clone()).sum()
        x.add_(1.0)
        return out + self.q2(x).sum()


@pytest.mark.parametrize("inference", [False, True])
def test_only_the_very_same_content_is_shared(inference):
    def forward(model, batch):
        with torch.inference_mode(inference):
            return model(batch)

    model, batches = seeded(Attention), batches_of(3, 4)
    found = collect(model, forward, batches)
    assert found.key_of == {
        "q.weight": "q.weight", "k.weight": "q.weight", "v.weight": "v.weight", "k2.weight": "k2.weight",
        "q2.weight": "q2.weight",
    }  # fmt: skip
    x = torch.cat(batches)
    check(found, "k.weight", x)
    check(found, "v.weight", x, bias=False)
    check(found, "k2.weight", x)
    check(found, "q2.weight", x + 1)
    assert not any(g.is_inference() or g.requires_grad for g in found.grams.values())
    together = collect(model, forward, batches, bias=False)
    assert together.key_of["v.weight"] == together.key_of["k.weight"] == "q.weight"
    assert found.bytes == 8 * (3 * 25 + 16)
    assert found.to(torch.float32).bytes == found.bytes // 2


class Switching(nn.Module):
    """a and b read the same tensor in some forwards only; c runs in some only."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.read = {"a": [], "b": [], "c": []}

    def call(self, name, x):
        self.read[name].append(x.clone())
        return getattr(self, name)(x)

    def forward(self, x, steps):
        other = x * 2
        for name, which in steps:
            self.call(name, other if which == "other" else x)


PLANS = {
    "always": [[("a", "x"), ("b", "x")]] * 3,
    "first only": [[("a", "x"), ("b", "x")], [("a", "x"), ("b", "other")], [("a", "x"), ("b", "x")]],
    "partly": [[("a", "x"), ("a", "other"), ("b", "x"), ("b", "other")], [("a", "x"), ("b", "x"), ("b", "other")]],
    "late": [[("a", "x"), ("b", "other")], [("a", "x"), ("b", "x")]],
    "missing": [[("a", "x"), ("b", "x"), ("c", "x")], [("a", "x"), ("c", "x")], [("c", "x"), ("a", "x"), ("b", "x")]],
    "appearing": [[("a", "x")], [("a", "x"), ("b", "x"), ("c", "x")], [("b", "other"), ("c", "other")]],
    "repeated": [[("a", "x"), ("b", "x"), ("a", "x"), ("b", "x")], [("b", "x"), ("a", "x")]],
    "longer": [[("a", "x"), ("b", "x"), ("b", "other")], [("a", "x"), ("b", "other")], [("a", "x"), ("b", "x")]],
    "joining": [[("a", "x"), ("b", "x")], [("a", "x"), ("c", "x"), ("c", "other")], [("c", "x")]],
    "crossed": [[("a", "x"), ("b", "other"), ("a", "other"), ("b", "x")]] * 2,
}
SHARED = {
    "always": [{"a", "b"}], "first only": [], "partly": [], "late": [], "missing": [{"a", "c"}],
    "appearing": [{"b", "c"}], "repeated": [{"a", "b"}], "longer": [], "joining": [], "crossed": [],
}  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
def test_sharing_is_confirmed_in_every_batch_and_sums_are_right_when_it_ends(plan):
    model = seeded(Switching)
    inputs = list(zip(batches_of(3, sizes=(4, 2, 5)), PLANS[plan], strict=False))
    found = collect(model, lambda m, batch: m(*batch), inputs)
    for name, read in model.read.items():
        if read:
            check(found, f"{name}.weight", torch.cat(read))
        else:
            assert f"{name}.weight" in found.skipped
    keys = {}
    for name, key in found.key_of.items():
        keys.setdefault(key, set()).add(name[0])
    assert [group for group in keys.values() if len(group) > 1] == SHARED[plan]


def test_tied_weights_sum_over_their_uses():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight, self.b.bias = self.a.weight, self.a.bias
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight
            self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 4)
            self.d.weight = self.c.weight  # with a bias of its own
            self.e, self.f = nn.Linear(4, 4), nn.Linear(4, 4)
            self.f.bias = self.e.bias  # with a weight of its own

        def forward(self, x):
            y = self.a(x)
            return self.head(self.b(y) + self.c(x) + self.d(x) + self.e(x) + self.f(x))

    model, batches = seeded(Tied), batches_of(4)
    found = collect(model, plain, batches)
    x = torch.cat(batches)
    check(found, "a.weight", torch.cat([x, model.a(x)]))
    assert found.key_of["b.weight"] == "a.weight"
    assert found.bias_of == {"a.weight": "a.bias", "b.weight": "b.bias"}
    assert found.skipped["embed.weight"] == found.skipped["head.weight"]
    assert found.skipped["embed.weight"].startswith("tied: Embedding")
    assert "another bias" in found.skipped["c.weight"]
    assert not found.has_bias[found.key_of["e.weight"]]  # one bias, two weights: it joins neither


def heads(x, n):
    return x.unflatten(-1, (n, -1)).transpose(-2, -3)


def context_by_hand(attention, q, k, v, mask=None):
    wq, wk, wv = attention.in_proj_weight.chunk(3)
    bq, bk, bv = attention.in_proj_bias.chunk(3)
    n = attention.num_heads
    q, k, v = (heads(F.linear(*z), n) for z in ((q, wq, bq), (k, wk, bk), (v, wv, bv)))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None, :], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_self_attention(batch_first):
    attention = seeded(lambda: nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=batch_first))
    attention.in_proj_bias.data.normal_(generator=torch.Generator().manual_seed(2))
    batches = batches_of(5, 8)
    mask = torch.tensor([False, False, False, True, True])

    def forward(model, x):
        y = x if batch_first else x.transpose(0, 1)
        return model(y, y, value=y, key_padding_mask=mask.expand(len(x), 5), need_weights=False)

    before = attention.training, forward(attention.eval(), batches[0])[0]
    attention.train()
    found = collect(attention, forward, batches)
    assert attention.training
    x = torch.cat(batches)
    check(found, "in_proj_weight", x)
    check(found, "out_proj.weight", context_by_hand(attention, x, x, x, mask.expand(len(x), 5)))
    assert found.bias_of == {"in_proj_weight": "in_proj_bias", "out_proj.weight": "out_proj.bias"}
    assert torch.equal(forward(attention.eval(), batches[0])[0], before[1])


def test_multihead_cross_attention_keeps_only_what_has_one_input():
    attention = seeded(lambda: nn.MultiheadAttention(8, 2, batch_first=True))
    x, y = batches_of(5, 8), batches_of(7, 8, seed=1)
    found = collect(attention, lambda m, b: m(b[0], b[1], b[1]), zip(x, y, strict=True))
    assert "cross-attention" in found.skipped["in_proj_weight"]
    check(found, "out_proj.weight", context_by_hand(attention, torch.cat(x), torch.cat(y), torch.cat(y)))
    # self-attention that turns into cross-attention in a later batch is no less cross
    mixed = [(x[0], x[0]), (x[1], y[1])]
    assert "in_proj_weight" in collect(attention, lambda m, b: m(b[0], b[1], b[1]), mixed).skipped


def test_multihead_attention_with_separate_projections():
    attention = seeded(lambda: nn.MultiheadAttention(8, 2, kdim=5, vdim=3, batch_first=True))
    q, k, v = batches_of(4, 8), batches_of(6, 5, seed=1), batches_of(6, 3, seed=2)
    found = collect(attention, lambda m, b: m(*b), zip(q, k, v, strict=True))
    check(found, "q_proj_weight", torch.cat(q), bias=False)
    check(found, "k_proj_weight", torch.cat(k), bias=False)
    check(found, "v_proj_weight", torch.cat(v), bias=False)
    assert "out_proj.weight" in found.key_of


def test_transformer_encoder_is_seen_despite_its_fused_path():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
    model = seeded(lambda: nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    batches = batches_of(5, 8)
    found = collect(model.eval(), plain, batches)
    assert not found.skipped
    assert len(found.grams) == 8
    x = torch.cat(batches)
    check(found, "layers.0.self_attn.in_proj_weight", model.layers[0].norm1(x))
    assert torch.backends.mha.get_fastpath_enabled()


def test_other_uses_of_a_weight_are_listed():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.position, self.scaled = nn.Parameter(torch.zeros(3, 4)), Scaled(4, 4)
            self.signal, self.normed = nn.Conv1d(3, 3, 1), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

        def forward(self, x):
            return self.normed(self.signal(self.scaled(x + self.position)))

    found = collect(seeded(Odd), plain, batches_of(3, 4))
    assert found.grams == {}
    assert set(found.skipped) >= {"position", "scaled.weight", "signal.weight"}
    assert any(name.startswith("normed.parametrizations") for name in found.skipped)


def test_the_model_is_left_as_it_was_even_after_an_error():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()).train()
    model[2].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    collect(model, plain, batches_of(3))
    with pytest.raises(GramError, match=r"0.weight: inputs have shape"):
        collect(model, plain, batches_of(4))
    with pytest.raises(ZeroDivisionError):
        collect(model, lambda m, x: m(x) / (1 // 0), batches_of(3))
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_progress_batches_and_bad_activations():
    model, done = nn.Sequential(nn.Linear(3, 3)), []
    collect(model, plain, iter(batches_of(3)), progress=done.append, device="cpu")
    assert done == [1, 2, 3]
    with pytest.raises(GramError, match="no calibration batches"):
        collect(model, plain, [])
    with pytest.raises(GramError, match=r"0.weight: .*non-finite"):
        collect(model, plain, [torch.full((2, 3), torch.nan)])


def test_autocast_does_not_coarsen_the_sums():
    model, batches = nn.Sequential(seeded(lambda: nn.Linear(6, 2))), batches_of(50, 6)

    def forward(m, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m(x)

    check(collect(model, forward, batches), "0.weight", torch.cat(batches))


def test_transformers_models():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    vit = seeded(
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**small, image_size=8, patch_size=4, num_labels=3)
        )
    )
    found = collect(vit, lambda m, x: m(pixel_values=x), batches_of(3, 8, 8))
    assert not [n for n, p in vit.named_parameters() if p.dim() == 2 and n not in found.key_of]
    assert found.layout[next(n for n in found.layout if "patch_embeddings" in n)] == "conv2d"
    assert len(found.grams) == 2 + 2 * 4  # patches, head; a layer: q/k/v, o, fc1, fc2

    bert = seeded(lambda: transformers.BertModel(transformers.BertConfig(**small, vocab_size=30)))
    tokens = [torch.randint(30, (n, 7), generator=torch.Generator().manual_seed(n)) for n in (2, 5)]
    found = collect(bert, lambda m, x: m(input_ids=x), tokens)
    hidden = torch.cat([bert.eval().embeddings(t) for t in tokens])
    check(found, "encoder.layer.0.attention.self.value.weight", hidden)
    assert found.key_of["encoder.layer.0.attention.self.key.weight"].endswith("0.attention.self.query.weight")
    assert found.skipped["embeddings.word_embeddings.weight"].startswith("Embedding")

    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=8)
    gpt2 = seeded(lambda: transformers.GPT2LMHeadModel(config))
    found = collect(gpt2, lambda m, x: m(input_ids=x), tokens)
    block = gpt2.eval().transformer.h[0]
    embedded = torch.cat([gpt2.transformer.wte(t) + gpt2.transformer.wpe.weight[:7] for t in tokens])
    check(found, "transformer.h.0.attn.c_attn.weight", block.ln_1(embedded))
    assert found.layout["transformer.h.0.mlp.c_fc.weight"] == "conv1d"
    assert found.skipped["transformer.wte.weight"].startswith("tied: Embedding")
