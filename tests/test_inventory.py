"""What checkpoints are made of, on plain state dicts with the names of timm and open_clip, and on the command line."""

import json

import pytest
import torch
from bmm_cli.main import bmm as cli
from click.testing import CliRunner
from safetensors.torch import save_file

import bmm
from bmm.checkpoint import open_checkpoint
from bmm.inventory import inventory
from tests.families import save


def timm():
    shapes = {"cls_token": (1, 1, 8), "pos_embed": (1, 5, 8), "patch_embed.proj.weight": (8, 3, 2, 2),
              "patch_embed.proj.bias": (8,), "norm.weight": (8,), "head.weight": (3, 8), "head.bias": (3,)}  # fmt: skip
    for n in range(3):
        block = {"norm1.weight": (8,), "attn.qkv.weight": (24, 8), "attn.qkv.bias": (24,), "attn.proj.weight": (8, 8),
                 "mlp.fc1.weight": (16, 8), "mlp.fc2.weight": (8, 16)}  # fmt: skip
        shapes |= {f"blocks.{n}.{k}": v for k, v in block.items()}
    return shapes


def open_clip():
    shapes = {"positional_embedding": (6, 8), "token_embedding.weight": (20, 8), "text_projection": (8, 4),
              "ln_final.weight": (8,), "logit_scale": (), "visual.class_embedding": (8,), "visual.proj": (8, 4),
              "visual.positional_embedding": (5, 8), "visual.conv1.weight": (8, 3, 2, 2)}  # fmt: skip
    for tower in ("visual.transformer", "transformer"):
        for n in range(2):
            block = {"ln_1.weight": (8,), "attn.in_proj_weight": (24, 8), "attn.in_proj_bias": (24,),
                     "attn.out_proj.weight": (8, 8), "mlp.c_fc.weight": (16, 8),
                     "mlp.c_proj.weight": (8, 16)}  # fmt: skip
            shapes |= {f"{tower}.resblocks.{n}.{k}": v for k, v in block.items()}
    return shapes


def write(shapes, folder, names=("base", "a", "b")):
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(0)
        base = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        generator.manual_seed(seed)
        moved = {n: t + (seed > 0) * 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        save_file(moved, folder / f"{name}.safetensors")
    return {
        "base": str(folder / "base.safetensors"),
        "experts": {n: str(folder / f"{n}.safetensors") for n in names[1:]},
    }


SOLVED = {
    timm: {"patch": 1, "qkv": 3, "o": 3, "fc1": 3, "fc2": 3, "head": 1},
    open_clip: {"conv1": 1, "qkv": 4, "o": 4, "fc1": 4, "fc2": 4},
}


@pytest.mark.parametrize("shapes", [timm, open_clip])
def test_state_dicts_of_timm_and_open_clip(shapes, tmp_path):
    """Roles, plain merges and data-free BMM need names and shapes alone."""
    keys = write(shapes(), tmp_path)
    checkpoint = open_checkpoint(keys["base"])
    found = inventory({n: checkpoint.info(n) for n in checkpoint.names})
    solved: dict[str, int] = {}
    for entry in found:
        if entry.merged == "solved":
            solved[entry.role] = solved.get(entry.role, 0) + entry.tensors
    assert solved == SOLVED[shapes]
    assert sum(e.tensors for e in found) == len(shapes())
    assert sum(e.parameters for e in found) == sum(t.numel() for t in checkpoint.values())
    plain = bmm.merge(keys, anchor="tsv")
    merged = bmm.merge(keys, anchor="tsv", grams="datafree", groups="bands", bands=2, lam=0.1)
    moved = {n for n in plain if not torch.equal(plain[n], merged[n])}
    assert moved == {n for n in shapes() if bmm.groups.role_of(n) in SOLVED[shapes] and n.endswith("weight")}
    with torch.no_grad():
        assert all(torch.isfinite(t).all() for t in merged.values())


def test_inspect_lists_modules_ties_and_heads(tmp_path):
    keys = save("bert_mlm", tmp_path)
    done = CliRunner().invoke(cli, ["inspect", keys["base"], "--json"])
    assert done.exit_code == 0, done.output
    modules = json.loads(done.output)["modules"]
    by_role = {m["role"]: m for m in modules}
    assert by_role["q"] | {"first": ""} == {
        "role": "q", "shape": [16, 16], "depth": "0-1", "tensors": 2, "parameters": 512, "dtype": "float32",
        "merged": "solved", "tied": False, "first": ""}  # fmt: skip
    assert by_role["q.bias"]["merged"] == "with its weight"
    assert by_role["norm"]["merged"] == by_role["embed"]["merged"] == "anchor"
    assert by_role["head"]["depth"] == ""
    text = CliRunner().invoke(cli, ["inspect", keys["base"], *keys["experts"].values()]).output
    assert "| q " in text
    assert "all values finite" in text


def test_tied_tensors_are_counted_once_and_stay_with_the_anchor():
    infos = {"model.embed_tokens.weight": (6, 4), "lm_head.weight": (6, 4), "step": ()}
    from bmm.checkpoint import TensorInfo

    described = {n: TensorInfo(s, torch.int64 if n == "step" else torch.float32) for n, s in infos.items()}
    tied = inventory(described, {}, [("lm_head.weight", "model.embed_tokens.weight")])
    assert [(e.role, e.merged, e.tied) for e in tied] == [("step", "base", False), ("head", "anchor", True)]
    free = inventory(described)
    assert [(e.role, e.merged) for e in free] == [("embed", "anchor"), ("step", "base"), ("head", "solved")]


def test_depths_of_both_halves_and_of_gaps():
    from bmm.checkpoint import TensorInfo

    names = [f"{h}.block.{n}.layer.0.SelfAttention.q.weight" for h in ("encoder", "decoder") for n in (0, 1, 3)]
    (entry,) = inventory({n: TensorInfo((4, 4), torch.float32) for n in names})
    assert entry.depth == "encoder 0-1, 3, decoder 0-1, 3"
