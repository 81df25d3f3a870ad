"""A base and experts whose tensors hold a few easy numbers, and recipes of them."""

import json

import torch
from safetensors.torch import save_file

import bmm

EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
LAYERS = 3


def q(layer):
    return f"model.layers.{layer}.self_attn.q_proj.weight"


def up(layer):
    return f"model.layers.{layer}.mlp.up_proj.weight"


NAMES = [EMBED, *(f(layer) for layer in range(LAYERS) for f in (q, up)), NORM]


def write(folder, values, dtype=torch.float32, **config):
    """A model whose tensors all hold ``values``, as a matrix or (the norm) as a vector."""
    folder.mkdir()
    vector = torch.tensor(values, dtype=dtype)
    model = {name: (vector if name == NORM else vector.reshape(2, -1)).clone() for name in NAMES}
    save_file(model | {"steps": torch.tensor([7])}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "float32", **config}))


BASE = torch.tensor([1.0, 2.0, 3.0, 4.0])
A, B, C = (torch.tensor(v) for v in ([1.0, 0.0, -2.0, 4.0], [0.0, 3.0, 1.0, -1.0], [-1.0, -1.0, 0.0, 2.0]))


def recipe(folder, method, names="ab", own=(), base="base", **whole):
    """A recipe of experts, ``own`` their parameters in turn."""
    own = [*own, *[{}] * (len(names) - len(own))]
    found = {
        "merge_method": method,
        "models": [{"model": str(folder / n), "parameters": p} for n, p in zip(names, own, strict=True)],
        "parameters": whole,
    }
    return found | ({"base_model": str(folder / base)} if base else {})


def merged(folder, *args, **kwargs):
    notices = []
    progress = kwargs.pop("progress", lambda stage, done, total, text="": stage == "notice" and notices.append(text))
    out = bmm.merge_mergekit(recipe(folder, *args, **kwargs), progress=progress)
    assert set(out) == {*NAMES, "steps"}
    assert out["steps"].tolist() == [7]
    return {name: out[name].flatten() for name in NAMES} | {"notices": notices}


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=1e-5, rtol=1e-5)
