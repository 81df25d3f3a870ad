"""Grams of attention and of whole models, collected by hooks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bmm.errors import GramError
from bmm.grams import collect
from tests.grams.modules import batches_of, check, plain, seeded


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
