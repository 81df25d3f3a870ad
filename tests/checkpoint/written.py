"""Tensors to write, and what lies in a folder."""

import json

import pytest
import torch
from safetensors.torch import save_file

from bmm.checkpoint import open_checkpoint, write_checkpoint
from bmm.errors import WriteError


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(4, 6, generator=generator),
        "a.weight": torch.randn(8, 8, generator=generator).bfloat16(),
        "scale": torch.tensor(2.5, dtype=torch.float64),
        "position_ids": torch.arange(5, dtype=torch.int32),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }


def original(folder, content=None, config=None):
    """A model folder with side files, opened."""
    folder.mkdir()
    save_file(tensors() if content is None else content, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config if config is not None else {"model_type": "x"}))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "training_args.bin").write_bytes(b"no")
    return open_checkpoint(folder)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(tmp_path, words, *arguments, **options):
    """Writing fails with a `WriteError`, and leaves the parent folder as it was."""
    before = files(tmp_path)
    with pytest.raises(WriteError, match=words):
        write_checkpoint(tmp_path / "out", *arguments, **options)
    assert files(tmp_path) == before
