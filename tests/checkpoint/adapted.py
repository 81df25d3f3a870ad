"""Adapters of a small Llama, and changes to them."""

import json

from safetensors.torch import load_file, save_file

from bmm.checkpoint import open_checkpoint, open_model

QV = {"target_modules": ["q_proj", "v_proj"]}


def opened(base, adapter, **options):
    start = open_checkpoint(base)
    return start, open_model(adapter, start, **options)


def altered(adapter, folder, tensors=lambda t: t, **config):
    """A copy of an adapter with other settings or tensors."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps(json.loads((adapter / "adapter_config.json").read_text()) | config)
    )
    save_file(tensors(load_file(adapter / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    return folder
