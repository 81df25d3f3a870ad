import pytest

from bmm.errors import RecipeError
from bmm.groups import depth_of, module_of, role_of, search_groups


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
    ],
)
def test_roles_of_common_libraries(name, role):
    assert role_of(name) == role


def test_depth_and_module():
    assert depth_of("blocks.3.mlp.fc1.weight") == 3
    assert depth_of("patch.weight") is None
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


def test_unknown_scheme_suggests():
    with pytest.raises(RecipeError) as caught:
        search_groups(NAMES, "roles")
    assert "role" in caught.value.hint
