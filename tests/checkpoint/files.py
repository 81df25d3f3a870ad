"""Checkpoint files of every form."""

import json

import pytest
import torch
from safetensors.torch import save_file

from bmm.checkpoint import TensorInfo, open_checkpoint
from bmm.errors import CheckpointError


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "encoder.weight": torch.randn(4, 6, generator=generator),
        "encoder.bias": torch.randn(4, generator=generator).half(),
        "encoder.scale": torch.tensor(2.5, dtype=torch.bfloat16),
        "head.weight": torch.randn(2, 4, generator=generator, dtype=torch.float64),
        "position_ids": torch.arange(5),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
    }


def equal(checkpoint, expected):
    assert checkpoint.names == tuple(sorted(expected)) == tuple(checkpoint)
    for name, tensor in expected.items():
        assert checkpoint.info(name) == TensorInfo(tuple(tensor.shape), tensor.dtype)
        found = checkpoint[name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    return True


def write_shards(folder, shards, weight_map=None, kind="safetensors"):
    """Shards by file name with an index beside them."""
    stem = "model" if kind == "safetensors" else "pytorch_model"
    for file, content in shards.items():
        save_file(content, folder / file) if kind == "safetensors" else torch.save(content, folder / file)
    weight_map = weight_map or {name: file for file, content in shards.items() for name in content}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refused(path, *words, **options):
    """The error of opening ``path``: one line that names the file, a hint, and all of ``words``."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, **options)
    message = caught.value.message
    assert "\n" not in message
    assert message.startswith(str(path))
    assert caught.value.hint
    for word in words:
        assert word in message
    return caught.value


# every form


def form_single_safetensors(folder, content):
    save_file(content, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def form_folder(folder, content):
    save_file(content, folder / "model.safetensors")
    return folder


def form_folder_of_any_name(folder, content):
    save_file(content, folder / "diffusion.safetensors")
    return folder


def _halves(content):
    names = sorted(content)
    return {n: content[n] for n in names[:3]}, {n: content[n] for n in names[3:]}


def form_shards(folder, content):
    one, two = _halves(content)
    write_shards(folder, {"model-00001-of-00002.safetensors": one, "model-00002-of-00002.safetensors": two})
    return folder


def form_bin_folder(folder, content):
    torch.save(content, folder / "pytorch_model.bin")
    return folder


def form_bin_shards(folder, content):
    one, two = _halves(content)
    shards = {"pytorch_model-00001-of-00002.bin": one, "pytorch_model-00002-of-00002.bin": two}
    write_shards(folder, shards, kind="bin")
    return folder


def form_bin(folder, content):
    torch.save(content, folder / "w.bin")
    return folder / "w.bin"


def form_nested_state_dict(folder, content):
    torch.save({"state_dict": content, "epoch": 3}, folder / "w.pt")
    return folder / "w.pt"


def form_nested_model(folder, content):
    torch.save({"model": content, "step": 1}, folder / "w.pth")
    return folder / "w.pth"


def form_hub_cache(folder, content):
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(content, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    return snapshot


FORMS = [value for name, value in sorted(globals().items()) if name.startswith("form_")]
