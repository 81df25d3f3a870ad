"""Damaged and hostile checkpoints are refused with one line that names the file."""

import io
import json
import os
import pickle
import re
import resource
import struct
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from bmm.checkpoint import open_checkpoint
from bmm.checkpoint.safetensors_file import SafetensorsFile
from bmm.errors import CheckpointError
from tests.checkpoint.files import entry, equal, form_bin, form_folder, form_single_safetensors, refused, tensors


def header_file(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def one_line(error):
    assert "\n" not in error.message
    assert "weights_only" not in str(error)  # torch's advice to switch the safety off is not passed on
    assert error.hint


DAMAGED_HEADERS = {
    "not json": (b"{nonsense", b"", "not JSON"),
    "not an object": (b"[1, 2]  ", b"", "not JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", "not JSON"),
    "nested": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"", "not JSON"),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", b"", "not JSON"),
    "twice": (b'{"a": 1, "a": 2}', b"", "appears twice"),
    "surrogate": (b'{"\\ud800": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"8" * 8, "no tensor name"),
    "metadata": ({"__metadata__": {"a": 1}, "a": entry()}, b"8" * 8, "__metadata__"),
    "lacks": ({"a": {"dtype": "F32", "shape": [2]}}, b"8" * 8, "lacks"),
    "beyond": ({"a": entry((4,), (0, 16))}, b"8" * 8, "ends at byte 16 of 8"),
    "far beyond": ({"a": entry((2**58,), (0, 2**60))}, b"8" * 8, "ends at byte"),
    "overlap": ({"a": entry(), "b": entry((2,), (4, 12))}, b"8" * 12, "overlaps"),
    "gap": ({"a": entry(), "b": entry((2,), (12, 20))}, b"8" * 20, "gap"),
    "trailing": ({"a": entry()}, b"8" * 12, "4 bytes follow"),
    "reversed": ({"a": entry((2,), (8, 0))}, b"8" * 8, "needs 8 bytes"),
    "mismatch": ({"a": entry((3,), (0, 8))}, b"8" * 8, "needs 12 bytes"),
    "negative": ({"a": entry((-2,), (0, 8))}, b"8" * 8, "invalid shape"),
    "bool": ({"a": entry((True, 2), (0, 8))}, b"8" * 8, "invalid shape"),
    "float": ({"a": entry((2.0,), (0, 8))}, b"8" * 8, "invalid shape"),
    "overflow": ({"a": entry((2**62, 2**62, 0), (0, 0))}, b"", "impossible shape"),
    "dimensions": ({"a": entry((1,) * 100, (0, 4))}, b"4444", "invalid shape"),
    "dtype": ({"a": entry(dtype="F8_E4M3", offsets=(0, 2))}, b"88", "unsupported dtype"),
    "unknown dtype": ({"a": entry(dtype=["x"])}, b"8" * 8, "unsupported dtype"),
    "empty": ({}, b"", "no tensors"),
}


@pytest.mark.parametrize("case", sorted(DAMAGED_HEADERS))
def test_damaged_safetensors_headers_are_refused(case, tmp_path):
    header, data, word = DAMAGED_HEADERS[case]
    refused(header_file(tmp_path / "m.safetensors", header, data), word)


def test_files_that_are_not_weights_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    refused(path, "no such file")
    path.write_bytes(b"")
    refused(path, "empty")
    path.write_bytes(b"123")
    refused(path, "in a file of 3")
    header_file(path, b"{}", length=2**63)
    refused(path, "claims a header")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert "git lfs pull" in refused(path, "git-lfs").hint
    path.rename(tmp_path / "m.bin")
    refused(tmp_path / "m.bin", "git-lfs")
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "pipe.safetensors", "not a regular file")
    (tmp_path / "m.onnx").write_bytes(b"1")
    refused(tmp_path / "m.onnx", "not a known kind")
    with pytest.raises(CheckpointError):
        open_checkpoint("nul\0byte")
    with pytest.raises(CheckpointError, match="not a list"):
        open_checkpoint(tmp_path, skip="head")


@pytest.mark.parametrize("kept", [1, 7, 8, 9, 60, -1])
def test_truncated_safetensors_are_refused(kept, tmp_path):
    path = form_single_safetensors(tmp_path, tensors())
    path.write_bytes(path.read_bytes()[:kept])
    refused(path)


@pytest.mark.parametrize("form", [form_single_safetensors, form_bin])
def test_a_file_that_changes_or_goes_after_opening_is_an_error_not_a_crash(form, tmp_path):
    path = form(tmp_path, tensors())
    checkpoint = open_checkpoint(path)
    os.truncate(path, 40)
    with pytest.raises(CheckpointError, match="changed after it was opened"):
        checkpoint["head.weight"]
    path.unlink()
    with pytest.raises(CheckpointError, match=re.escape(path.name)):
        checkpoint["head.weight"]


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": entry((2, 3), (0, 24)),
    "b": entry((4,), (24, 32), "F16"),
    "c": entry((), (32, 40), "I64"),
}


JSON_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4),
    st.lists(st.integers(-1, 50), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@st.composite
def mutated_files(draw):
    header = json.loads(json.dumps(HEADER))
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(["__metadata__", "a", "b", "c", "d"]))
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra", None]))
        if key is None or not isinstance(header.get(name), dict):
            header[name] = draw(JSON_VALUES)
        else:
            header[name][key] = draw(JSON_VALUES)
    raw = json.dumps(header).encode()
    whole = bytearray(struct.pack("<Q", len(raw)) + raw + bytes(range(40)))
    for _ in range(draw(st.integers(0, 3))):
        whole[draw(st.integers(0, len(whole) - 1))] = draw(st.integers(0, 255))
    return bytes(whole[: draw(st.one_of(st.just(len(whole)), st.integers(1, len(whole))))])


@settings(deadline=None, max_examples=400)
@given(mutated_files())
def test_mutated_safetensors_are_read_as_the_reference_reads_them_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        one_line(error)
        return
    with safe_open(path, "pt") as reference:  # whatever is accepted, the reference implementation accepts
        assert set(reference.keys()) == set(checkpoint)
        for name in checkpoint:
            expected = reference.get_tensor(name)
            found = checkpoint[name]
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_the_unmutated_fuzz_file_is_accepted(tmp_path):
    path = header_file(tmp_path / "m.safetensors", HEADER, bytes(range(40)))
    assert set(SafetensorsFile(path).infos) == {"a", "b", "c"}


# folders and indices


def test_folders_without_or_with_too_many_weights_are_refused(tmp_path):
    refused(tmp_path, "no weights")
    save_file(tensors(), tmp_path / "one.safetensors")
    save_file(tensors(), tmp_path / "two.safetensors")
    refused(tmp_path, "2 safetensors files and no index")
    (tmp_path / "two.safetensors").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "LoRA")


def test_unfinished_folders_are_refused(tmp_path):
    save_file(tensors(), tmp_path / "model-00001-of-00002.safetensors")
    refused(tmp_path, "without their")
    (tmp_path / "model-00001-of-00002.safetensors").rename(tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path)
    (tmp_path / "x.incomplete").write_text("")
    refused(tmp_path, "unfinished")
    cut_off = tmp_path / ".out.incomplete-123"
    cut_off.mkdir()
    save_file(tensors(), cut_off / "model.safetensors")
    refused(cut_off, "cut off")


def test_a_damaged_config_is_refused_at_opening(tmp_path):
    form_folder(tmp_path, tensors())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json.*not a valid model configuration"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "word"),
    [
        ({"a": "../outside.safetensors"}, "not a plain file name"),
        ({"a": "/etc/passwd"}, "not a plain file name"),
        ({"a": "sub/m.safetensors"}, "not a plain file name"),
        ({"a": "..\\m.safetensors"}, "not a plain file name"),
        ({"a": ".."}, "not a plain file name"),
        ({"a": "m\0.safetensors"}, "not a plain file name"),
        ({"a": "pickle.bin"}, "no .safetensors file"),
        ({"a": 3}, "no shard is named"),
        ({"a": ""}, "no shard is named"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
        ({"a": "one.safetensors", "b": "absent.safetensors"}, "missing"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "not in their shard"),
        ({"a": "one.safetensors", "b": "link.safetensors"}, "outside its folder"),
        ({"a": "one.safetensors", "c": "two.safetensors"}, "does not list: 'd'"),
        ({"a": "one.safetensors", "c": "again.safetensors"}, "is in"),
    ],
)
def test_indices_that_lie_are_refused(tmp_path, weight_map, word):
    folder = tmp_path / "model"
    folder.mkdir()
    for where in (tmp_path / "outside.safetensors", folder / "one.safetensors"):
        save_file({"a": torch.zeros(2)}, where)
    save_file({"c": torch.zeros(2), "d": torch.zeros(2)}, folder / "two.safetensors")
    save_file({"a": torch.zeros(2), "c": torch.zeros(2)}, folder / "again.safetensors")
    (folder / "pickle.bin").write_bytes(b"1")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=re.escape(word)) as caught:
        open_checkpoint(folder)
    assert "\n" not in caught.value.message


def test_an_index_that_is_not_json_and_two_indices_are_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("[")
    with pytest.raises(CheckpointError, match="not a valid index"):
        open_checkpoint(tmp_path)
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    refused(tmp_path, "several index files")


def test_a_link_out_of_the_folder_is_refused_but_a_named_link_is_the_users(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(tensors(), tmp_path / "elsewhere.safetensors")
    link = folder / "model.safetensors"
    link.symlink_to(tmp_path / "elsewhere.safetensors")
    refused(folder, "outside its folder")
    assert equal(open_checkpoint(link), tensors())


# pickles


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    trap = tmp_path / "trap"
    torch.save({"a": torch.zeros(1), "b": Payload(trap)}, tmp_path / "m.bin")
    error = refused(tmp_path / "m.bin", "mkdir", "can run code")
    assert "weights_only" not in str(error)
    (tmp_path / "m.pt").write_bytes(pickle.dumps(Payload(trap)))
    refused(tmp_path / "m.pt", "no torch.save archive")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ([torch.zeros(1)], "holds a list"),
        (torch.zeros(1), "holds a Tensor"),
        ({"a": torch.zeros(1), "step": 3}, "'step'"),
        ({"state_dict": {"a": 1}}, "not tensors"),
        ({3: torch.zeros(1)}, "no tensor name"),
        ({"": torch.zeros(1)}, "no tensor name"),
        ({}, "no tensors"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "unsupported dtype"),
        ({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, "unsupported dtype"),
        ({"a": torch.eye(3).to_sparse()}, "not a dense"),
        ({"a": torch.zeros(2, device="meta")}, "not a dense"),
        ({"a": torch.zeros(1).expand(2**40)}, "larger than what is stored"),
    ],
)
def test_torch_files_that_are_no_state_dict_are_refused(tmp_path, content, word):
    torch.save(content, tmp_path / "m.bin")
    refused(tmp_path / "m.bin", word)


def test_old_compressed_and_damaged_archives_are_refused(tmp_path):
    path = tmp_path / "m.bin"
    torch.save(tensors(), path, _use_new_zipfile_serialization=False)
    refused(path, "before torch 1.6")
    torch.save(tensors(), path)
    whole = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for item in plain.namelist():
            packed.writestr(item, plain.read(item))
    refused(path, "compressed")
    path.write_bytes(whole[: len(whole) // 2])
    refused(path)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6))
def test_mutated_torch_archives_are_read_or_refused(tmp_path_factory, changes):
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(3)}, buffer)
    content = bytearray(buffer.getvalue())
    for position, value in changes:
        content[position % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.pt"
    path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint:
            assert checkpoint[name].numel() * 4 <= len(content)
    except CheckpointError as error:
        one_line(error)


def test_opening_does_not_allocate_what_a_header_claims(tmp_path):
    path = header_file(tmp_path / "m.safetensors", {"a": entry((2**40,), (0, 2**42))}, b"8" * 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, "ends at byte")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024
