"""Opening checkpoints: every form, laziness, ties, and every kind of damaged or hostile input."""

import json
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from bmm.checkpoint import open_checkpoint
from bmm.errors import CheckpointError
from tests.checkpoint.files import (
    FORMS,
    entry,
    equal,
    form_bin,
    form_folder,
    form_shards,
    form_single_safetensors,
    refused,
    tensors,
)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tensors_and_fingerprint(form, tmp_path):
    checkpoint = open_checkpoint(form(tmp_path, tensors()))
    assert equal(checkpoint, tensors())
    assert checkpoint.nbytes == sum(t.numel() * t.itemsize for t in tensors().values())
    reference = tmp_path / "reference.pt"
    torch.save(tensors(), reference)
    assert checkpoint.fingerprint() == open_checkpoint(reference).fingerprint()


def test_the_fingerprint_sees_names_shapes_dtypes_and_values(tmp_path):
    def fingerprint(content):
        save_file(content, tmp_path / "m.safetensors")
        return open_checkpoint(tmp_path / "m.safetensors").fingerprint()

    zeros = torch.zeros(2, 3)
    variants = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.reshape(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": zeros + 1},
        {"a": zeros, "b": zeros.clone()},
    ]
    prints = [fingerprint(v) for v in variants]
    assert len(set(prints)) == len(prints)
    assert fingerprint(variants[0]) == prints[0]


def test_model_safetensors_is_preferred_to_bin(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path)["a"] == 1


def test_skip_leaves_names_out_and_records_them(tmp_path):
    checkpoint = open_checkpoint(form_shards(tmp_path, tensors()), skip=["head.*", "mask"])
    assert set(tensors()) - set(checkpoint) == {"head.weight", "mask"} == set(checkpoint.skipped)
    assert "head.weight" not in checkpoint
    with pytest.raises(KeyError):
        checkpoint["head.weight"]
    refused(tmp_path, "no tensors but skipped ones", skip=["*"])


def test_a_tensor_read_is_the_callers_own(tmp_path):
    for path in (form_single_safetensors(tmp_path, tensors()), form_bin(tmp_path, tensors())):
        checkpoint = open_checkpoint(path)
        checkpoint["encoder.weight"].zero_()
        assert torch.equal(checkpoint["encoder.weight"], tensors()["encoder.weight"])


def test_side_files_are_the_config_and_tokenizer_and_nothing_else(tmp_path):
    folder = form_folder(tmp_path, tensors())
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"}
    wanted |= {"merges.txt", "special_tokens_map.json", "preprocessor_config.json", "chat_template.jinja", "sp.model"}
    for name in wanted | {"training_args.bin", "README.md", "optimizer.pt", "trainer_state.json", "modeling_x.py"}:
        (folder / name).write_text("{}")
    checkpoint = open_checkpoint(folder)
    assert {path.name for path in checkpoint.side_files()} == wanted
    assert open_checkpoint(folder / "model.safetensors").side_files() == []
    (folder / "tokenizer_secret").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="outside its folder"):
        checkpoint.side_files()


# laziness

LAZY = """
import resource, sys
from bmm.checkpoint import open_checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checkpoint = open_checkpoint(sys.argv[1])
assert checkpoint.nbytes > 2**35, checkpoint.nbytes
assert checkpoint.info("huge").shape == (2**33,)
assert checkpoint["small"].tolist() == [1.0, 2.0]
for _ in range(20):
    assert checkpoint["middle"].shape == (2**20,)  # 4 MiB each time, and nothing kept
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_only_the_tensor_asked_for_is_read(tmp_path):
    huge, middle = 2**35, 2**22  # 32 GiB, sparse: reading it would exceed this machine's patience and memory
    header = json.dumps(
        {
            "small": entry((2,), (0, 8)),
            "middle": entry((2**20,), (8, 8 + middle)),
            "huge": entry((2**33,), (8 + middle, 8 + middle + huge)),
        }
    ).encode()
    path = tmp_path / "huge.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1, 2))
        file.truncate(8 + len(header) + 8 + middle + huge)
    run = subprocess.run([sys.executable, "-c", LAZY, path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 40 * 1024  # KiB


# ties


def test_names_that_share_storage_are_tied_but_other_views_are_not(tmp_path):
    shared = torch.randn(4, 4)
    content = {"embed": shared, "head": shared, "transposed": shared.T, "rows": shared[:2], "alone": torch.zeros(2)}
    torch.save(content, tmp_path / "m.bin")
    checkpoint = open_checkpoint(tmp_path / "m.bin")
    assert checkpoint.tied == (("embed", "head"),)
    assert torch.equal(checkpoint["transposed"], shared.T)
    assert checkpoint["transposed"].is_contiguous()
    assert open_checkpoint(tmp_path / "m.bin", skip=["head"]).tied == ()


@pytest.mark.parametrize(
    ("config", "same", "tied"),
    [
        ({"tie_word_embeddings": True}, True, True),
        ({"text_config": {"tie_word_embeddings": True}}, True, True),
        ({"tie_word_embeddings": True}, False, False),
        ({"tie_word_embeddings": False}, True, False),
        ({}, True, False),
        (None, True, False),
    ],
)
def test_declared_ties_need_the_declaration_and_equality(tmp_path, config, same, tied):
    embed = torch.randn(5, 3)
    head = embed.clone() if same else embed + 1
    other = embed.clone()
    save_file(
        {"model.embed_tokens.weight": embed, "lm_head.weight": head, "x.weight": other}, tmp_path / "model.safetensors"
    )
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    expected = (("lm_head.weight", "model.embed_tokens.weight"),) if tied else ()
    assert open_checkpoint(tmp_path).tied == expected
