import pytest

from bmm.errors import RecipeError
from bmm.groups import automatic_groups, depth_of, module_of, relative_depths, role_of, roles_of, search_groups


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("blocks.0.attn.q.weight", "q"),
        ("vision_model.encoder.layers.3.self_attn.k_proj.weight", "k"),
        ("vision_model.encoder.layers.3.self_attn.out_proj.weight", "o"),
        ("bert.encoder.layer.11.attention.self.value.weight", "v"),
        ("bert.encoder.layer.11.attention.output.dense.weight", "o"),
        ("bert.encoder.layer.11.intermediate.dense.weight", "fc1"),
        ("bert.encoder.layer.11.output.dense.weight", "fc2"),
        ("transformer.h.0.attn.c_attn.weight", "qkv"),
        ("transformer.h.0.mlp.c_proj.weight", "fc2"),
        ("model.layers.0.mlp.gate_proj.weight", "gate"),
        ("model.layers.0.mlp.down_proj.weight", "down"),
        ("decoder.block.0.layer.0.SelfAttention.q.weight", "q"),
        ("decoder.block.0.layer.2.DenseReluDense.wi_1.weight", "up"),
        ("vit.embeddings.patch_embeddings.projection.weight", "patch"),
        ("attn.in_proj_weight", "qkv"),
        ("stem.conv1.weight", "conv1"),
        ("stem.patch.weight", "patch"),
        ("pooler.dense.weight", "pooler.dense"),
        ("vit.layers.0.attention.q_proj.weight", "q"),
        ("model.layers.0.self_attn.qkv_proj.weight", "qkv"),
        ("model.layers.0.mlp.gate_up_proj.weight", "gate_up"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.block_sparse_moe.gate.weight", "router"),
        ("model.layers.0.mlp.shared_expert_gate.weight", "router"),
        ("encoder.block.1.layer.1.mlp.router.classifier.weight", "router"),
        ("model.layers.0.block_sparse_moe.experts.7.w1.weight", "gate"),
        ("model.layers.0.block_sparse_moe.experts.7.w2.weight", "down"),
        ("model.layers.0.mlp.experts.3.up_proj.weight", "up"),
        ("encoder.block.1.layer.1.mlp.experts.expert_3.wi.weight", "fc1"),
        ("model.layers.0.self_attn.q_norm.weight", "norm"),
        ("bert.encoder.layer.0.attention.output.LayerNorm.weight", "norm"),
        ("text_model.final_layer_norm.bias", "norm"),
        ("vision_model.pre_layrnorm.weight", "norm"),
        ("transformer.ln_f.weight", "norm"),
        ("transformer.wte.weight", "embed"),
        ("model.embed_tokens.weight", "embed"),
        ("bert.embeddings.token_type_embeddings.weight", "embed"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "embed"),
        ("vit.embeddings.cls_token", "embed"),
        ("lm_head.weight", "head"),
        ("classifier.out_proj.weight", "head"),
        ("cls.predictions.transform.dense.weight", "head"),
        ("score.weight", "head"),
        ("head.mlp.fc1.weight", "fc1"),  # SigLIP's attention pooling is no task head
        # timm
        ("patch_embed.proj.weight", "patch"),
        ("pos_embed", "embed"),
        ("blocks.0.attn.qkv.weight", "qkv"),
        ("blocks.0.attn.proj.weight", "o"),
        ("blocks.0.mlp.fc2.weight", "fc2"),
        ("fc_norm.weight", "norm"),
        ("head.weight", "head"),
        # open_clip
        ("visual.class_embedding", "embed"),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", "qkv"),
        ("visual.transformer.resblocks.0.attn.out_proj.weight", "o"),
        ("transformer.resblocks.3.mlp.c_fc.weight", "fc1"),
        ("transformer.resblocks.3.mlp.c_proj.weight", "fc2"),
        ("transformer.resblocks.3.ln_1.weight", "norm"),
        ("positional_embedding", "embed"),
        # torchvision
        ("encoder.layers.encoder_layer_0.mlp.0.weight", "fc1"),
        ("encoder.layers.encoder_layer_0.mlp.3.weight", "fc2"),
        ("encoder.layers.encoder_layer_0.self_attention.in_proj_weight", "qkv"),
    ],
)
def test_roles_of_common_libraries(name, role):
    assert role_of(name) == role


def test_a_gate_is_known_by_its_siblings():
    gated = roles_of([f"layers.0.feed_forward.w{k}.weight" for k in (1, 2, 3)])
    assert list(gated.values()) == ["gate", "down", "up"]
    assert list(roles_of(["layers.0.feed_forward.w1.weight", "layers.0.feed_forward.w2.weight"]).values()) == [
        "fc1", "fc2"]  # fmt: skip
    assert list(roles_of(["blocks.0.mlp.w12.weight", "blocks.0.mlp.w3.weight"]).values()) == ["gate_up", "down"]
    assert search_groups(["f.0.w1.weight", "f.0.w2.weight", "f.0.w3.weight"], "role")["f.0.w3.weight"] == "up"


def test_depth_and_module():
    assert depth_of("blocks.3.mlp.fc1.weight") == 3
    assert depth_of("patch.weight") is None
    assert depth_of("classifier.6.weight") is None
    assert depth_of("vit.encoder.layer.11.output.dense.bias") == 11
    assert module_of("a.b.bias") == "a.b"


NAMES = [f"blocks.{d}.attn.{r}.weight" for d in range(6) for r in "qk"] + ["stem.conv1.weight"]


def test_schemes():
    assert set(search_groups(NAMES, "global").values()) == {"all"}
    assert set(search_groups(NAMES, "role").values()) == {"q", "k", "conv1"}
    assert len(set(search_groups(NAMES, "module").values())) == len(NAMES)
    depth = search_groups(NAMES, "depth", bands=2)
    assert depth["blocks.2.attn.q.weight"] == depth["blocks.0.attn.k.weight"] == "depth.0"
    assert depth["blocks.3.attn.q.weight"] == "depth.1"
    assert depth["stem.conv1.weight"] == "outside"
    bands = search_groups(NAMES, "bands", bands=3)
    assert [bands[f"blocks.{d}.attn.q.weight"] for d in range(6)] == ["q.0", "q.0", "q.1", "q.1", "q.2", "q.2"]
    assert bands["stem.conv1.weight"] == "conv1"


def test_more_bands_than_blocks():
    bands = search_groups(["a.0.q.weight", "a.1.q.weight"], "bands", bands=5)
    assert list(bands.values()) == ["q.0", "q.1"]


def test_overrides_win_and_must_match():
    groups = search_groups(NAMES, "role", overrides={"*.attn.*": "attention"})
    assert set(groups.values()) == {"attention", "conv1"}
    with pytest.raises(RecipeError, match="matches no merged module"):
        search_groups(NAMES, "role", overrides={"*.mlp.*": "x"})


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [(30, ("bands", 6)), (14, ("bands", 3)), (9, ("role", 1)), (6, ("role", 1)), (4, ("depth", 1)), (2, ("global", 1))],
)
def test_automatic_groups_are_as_fine_as_the_parameters_allow(parameters, expected):
    found = automatic_groups(NAMES, parameters)
    assert found == expected
    assert 2 * len(set(search_groups(NAMES, *found).values())) <= parameters


def test_automatic_groups_count_overrides():
    assert automatic_groups(NAMES, 8) == ("role", 1)
    assert automatic_groups(NAMES, 8, {"stem.*": "k.0"}) == ("bands", 2)
    assert automatic_groups(["head.weight"], 50) == ("role", 1)


def test_unknown_scheme_suggests():
    with pytest.raises(RecipeError) as caught:
        search_groups(NAMES, "roles")
    assert "role" in caught.value.hint


@pytest.mark.parametrize(
    "depths",
    [
        {  # transformers ViT
            "vit.embeddings.cls_token": 0, "vit.embeddings.patch_embeddings.projection.weight": 0,
            "vit.encoder.layer.0.output.dense.weight": 0, "vit.encoder.layer.1.output.dense.weight": 0.5,
            "vit.encoder.layer.2.output.dense.weight": 1, "vit.layernorm.weight": 1, "classifier.weight": 1,
        },
        {  # torchvision ViT
            "class_token": 0, "conv_proj.weight": 0, "encoder.pos_embedding": 0,
            "encoder.layers.encoder_layer_0.mlp.3.weight": 0, "encoder.layers.encoder_layer_1.mlp.0.weight": 1,
            "encoder.ln.weight": 1, "heads.head.weight": 1,
        },
        {  # BERT
            "bert.embeddings.word_embeddings.weight": 0, "bert.encoder.layer.0.attention.self.query.weight": 0,
            "bert.encoder.layer.1.attention.self.query.weight": 1, "bert.pooler.dense.weight": 1,
            "cls.predictions.decoder.weight": 1, "cls.predictions.transform.dense.weight": 1,
        },
        {  # GPT-2
            "transformer.wte.weight": 0, "transformer.wpe.weight": 0, "transformer.h.0.attn.c_attn.weight": 0,
            "transformer.h.1.attn.c_attn.weight": 1, "transformer.ln_f.weight": 1, "lm_head.weight": 1,
        },
        {  # Llama and a mixture of experts
            "model.embed_tokens.weight": 0, "model.layers.0.self_attn.q_proj.weight": 0,
            "model.layers.1.block_sparse_moe.experts.7.w1.weight": 1, "model.norm.weight": 1, "lm_head.weight": 1,
        },
        {  # T5: the decoder follows the encoder; the layers of a block are parts of it
            "shared.weight": 0, "encoder.block.0.layer.0.SelfAttention.q.weight": 0,
            "encoder.block.0.layer.1.DenseReluDense.wi.weight": 0,
            "encoder.block.1.layer.0.SelfAttention.q.weight": 1 / 3,
            "encoder.final_layer_norm.weight": 1 / 3, "decoder.embed_tokens.weight": 2 / 3,
            "decoder.block.0.layer.1.EncDecAttention.q.weight": 2 / 3,
            "decoder.block.1.layer.2.DenseReluDense.wo.weight": 1,
            "decoder.final_layer_norm.weight": 1, "lm_head.weight": 1,
        },
        {  # a decoder alone (OPT)
            "model.decoder.embed_positions.weight": 0, "model.decoder.layers.0.fc1.weight": 0,
            "model.decoder.layers.1.fc1.weight": 1, "model.decoder.final_layer_norm.weight": 1,
        },
        {  # torchvision ResNet: stages of blocks
            "conv1.weight": 0, "bn1.weight": 0, "layer1.0.conv1.weight": 0, "layer1.1.bn2.weight": 1 / 3,
            "layer2.0.conv1.weight": 2 / 3, "layer2.0.downsample.0.weight": 2 / 3, "layer2.1.conv1.weight": 1,
            "fc.weight": 1,
        },
        {  # transformers ResNet and Swin: the same, written out
            "resnet.embedder.embedder.convolution.weight": 0,
            "resnet.encoder.stages.0.layers.0.layer.1.convolution.weight": 0,
            "resnet.encoder.stages.0.layers.1.layer.0.convolution.weight": 0.5,
            "resnet.encoder.stages.1.layers.0.layer.0.convolution.weight": 1, "classifier.1.weight": 1,
        },
        {
            "swin.encoder.layers.0.blocks.0.attention.self.key.weight": 0,
            "swin.encoder.layers.0.blocks.1.attention.self.key.weight": 0.5,
            "swin.encoder.layers.1.blocks.0.attention.self.key.weight": 1,
            "swin.encoder.layers.1.downsample.reduction.weight": 1, "swin.layernorm.weight": 1,
        },
        {  # CLIP: two towers, each from 0 to 1
            "visual.conv1.weight": 0, "visual.ln_pre.weight": 0, "visual.transformer.resblocks.0.mlp.c_fc.weight": 0,
            "visual.transformer.resblocks.1.mlp.c_fc.weight": 0.5, "visual.transformer.resblocks.2.mlp.c_fc.weight": 1,
            "visual.proj": 1, "token_embedding.weight": 0, "transformer.resblocks.0.mlp.c_fc.weight": 0,
            "transformer.resblocks.1.mlp.c_fc.weight": 1, "ln_final.weight": 1,
        },
        {"vision_model.pre_layrnorm.weight": 0, "vision_model.encoder.layers.0.mlp.fc1.weight": 0,
         "vision_model.encoder.layers.1.mlp.fc1.weight": 1, "vision_model.post_layernorm.weight": 1},
        {"features.0.weight": 0, "features.3.weight": 1, "classifier.0.weight": 1, "classifier.6.weight": 1},  # VGG
        {"0.weight": 0, "2.weight": 0.5, "4.weight": 1},
        {"conv.weight": 1, "embedding.weight": 1, "fc1.weight": 1},  # no blocks at all
    ],
    ids=lambda depths: next(iter(depths)),
)  # fmt: skip
def test_depths_of_common_libraries(depths):
    assert relative_depths(depths) == pytest.approx(depths)


def test_stages_and_decoders_have_bands_of_their_own():
    names = [f"layer{s}.{b}.conv1.weight" for s in (1, 2, 3, 4) for b in range(2)]
    groups = search_groups([*names, "fc.weight"], "depth", bands=4)
    assert [groups[n] for n in names] == [f"depth.{b}" for b in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert groups["fc.weight"] == "outside"
    halves = search_groups(
        [f"{h}.block.{b}.layer.0.q.weight" for h in ("encoder", "decoder") for b in range(3)], bands=2
    )
    assert list(halves.values()) == ["depth.0"] * 3 + ["depth.1"] * 3
