"""Writing checkpoints: round trips, dtypes, ties, atomicity under kills and failures, transformers."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from bmm.checkpoint import open_checkpoint, write_checkpoint
from tests.checkpoint.written import files, original, refused, tensors

# round trips


def test_a_single_file_holds_everything_and_reads_back(tmp_path):
    out = write_checkpoint(tmp_path / "new" / "out", tensors())
    assert files(out) == ["model.safetensors"]
    assert files(out.parent) == ["out"]
    found = open_checkpoint(out)
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert set(load_file(out / "model.safetensors")) == set(tensors())


@pytest.mark.parametrize("limit", [1, 100, 130, 200])
def test_shards_keep_to_their_size_and_read_back(tmp_path, limit):
    out = write_checkpoint(tmp_path / "out", iter(tensors().items()), max_shard_bytes=limit)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert files(out) == sorted([*shards, "model.safetensors.index.json"])
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for shard in shards:
        held = load_file(out / shard)
        assert len(held) == 1 or sum(t.numel() * t.itemsize for t in held.values()) <= limit
    found = open_checkpoint(out)
    assert index["metadata"]["total_size"] == found.nbytes
    reference = write_checkpoint(tmp_path / "single", tensors())
    assert found.fingerprint() == open_checkpoint(reference).fingerprint()


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    like = original(tmp_path / "base")
    one, two = (write_checkpoint(tmp_path / n, tensors(), like=like, max_shard_bytes=200) for n in ("one", "two"))
    assert files(one) == files(two)
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files(one))


def test_side_files_come_along_and_extra_files_win(tmp_path):
    like = original(tmp_path / "base")
    extra = {"README.md": "# card\n", "bmm_recipe.yaml": b"a: 1\n", "config.json": "{}"}
    out = write_checkpoint(tmp_path / "out", tensors(), like=like, extra_files=extra)
    assert files(out) == ["README.md", "bmm_recipe.yaml", "config.json", "model.safetensors", "tokenizer.json"]
    assert (out / "config.json").read_text() == "{}"
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()
    modes = {(out / name).stat().st_mode & 0o777 for name in files(out)}
    assert modes == {(tmp_path / "base" / "config.json").stat().st_mode & 0o777}


def test_views_strides_and_reused_buffers_are_written_as_they_were_when_given(tmp_path):
    buffer = torch.zeros(2, 3)

    def stream():
        for step in range(3):
            buffer.fill_(step)
            yield f"t{step}", buffer.T if step == 2 else buffer

    found = open_checkpoint(write_checkpoint(tmp_path / "out", stream()))
    assert [found[n].unique().tolist() for n in found.names] == [[0.0], [1.0], [2.0]]
    assert found["t2"].shape == (3, 2)


# planned places


def test_a_planned_file_is_what_the_safetensors_library_writes(tmp_path):
    like = original(tmp_path / "base")
    out = write_checkpoint(tmp_path / "out", reversed(list(tensors().items())), like=like)
    save_file(tensors(), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("limit", [1, 100, 130, 200])
def test_planned_shards_keep_to_their_size_in_any_order(tmp_path, limit):
    like = original(tmp_path / "base")
    out = write_checkpoint(tmp_path / "out", sorted(tensors().items()), like=like, max_shard_bytes=limit)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for shard in set(index["weight_map"].values()):
        held = load_file(out / shard)
        assert len(held) == 1 or sum(t.numel() * t.itemsize for t in held.values()) <= limit
    found = open_checkpoint(out)
    assert index["metadata"]["total_size"] == found.nbytes
    assert found.fingerprint() == like.fingerprint()


def test_no_tensor_is_held_where_places_are_planned(tmp_path):
    like = original(tmp_path / "base")
    alive = []

    def stream():
        for name in like:
            gc.collect()
            tensor = like[name]
            assert [r for r in alive[:-1] if r() is not None] == []
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    assert open_checkpoint(write_checkpoint(tmp_path / "out", stream(), like=like, owned=True))


def test_names_beyond_the_plan_get_a_shard_of_their_own(tmp_path):
    like = original(tmp_path / "base")
    out = write_checkpoint(tmp_path / "out", {"head": torch.ones(3), **tensors()}, like=like)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.pop("head") == "model-00002-of-00002.safetensors"
    assert set(index.values()) == {"model-00001-of-00002.safetensors"}
    assert torch.equal(open_checkpoint(out)["head"], torch.ones(3))


def test_a_disk_without_room_is_refused_before_any_tensor_is_made(tmp_path, monkeypatch):
    like = original(tmp_path / "base")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=like.nbytes))  # no room for the header

    def stream():
        raise AssertionError("asked for a tensor")
        yield

    refused(tmp_path, r"No space left: needs .* kB, .* kB are free", stream(), like=like)


# dtypes


def test_dtypes_are_those_of_like_unless_asked(tmp_path):
    like = original(tmp_path / "base")
    merged = {n: t.double() if t.is_floating_point() else t.clone() for n, t in tensors().items()}
    kept = open_checkpoint(write_checkpoint(tmp_path / "kept", merged, like=like))
    assert {n: kept.info(n) for n in kept} == {n: like.info(n) for n in like}
    one = open_checkpoint(write_checkpoint(tmp_path / "one", merged, like=like, dtypes=torch.float16))
    assert {one.info(n).dtype for n in one} == {torch.float16, torch.int32, torch.bool}
    named = open_checkpoint(write_checkpoint(tmp_path / "some", merged, like=like, dtypes={"scale": torch.float32}))
    assert named.info("scale").dtype == torch.float32
    assert named.info("a.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_says_the_dtype_that_was_written(tmp_path, key):
    like = original(tmp_path / "base", {"a": torch.ones(2)}, {"model_type": "x", key: "float32", "b": [1]})
    same = write_checkpoint(tmp_path / "same", {"a": torch.ones(2)}, like=like)
    assert (same / "config.json").read_bytes() == (like.path / "config.json").read_bytes()
    half = write_checkpoint(tmp_path / "half", {"a": torch.ones(2)}, like=like, dtypes=torch.bfloat16)
    assert json.loads((half / "config.json").read_text()) == {"model_type": "x", key: "bfloat16", "b": [1]}


def test_values_that_do_not_fit_are_refused_by_name(tmp_path):
    large = {"fine": torch.ones(2), "large": torch.tensor([1.0, -7e4])}
    refused(tmp_path, r"'large' reaches 7e\+04, more than torch.float16", large, dtypes=torch.float16)
    refused(tmp_path, "'large' reaches", {"large": torch.tensor(1e300, dtype=torch.float64)}, dtypes=torch.float32)
    refused(tmp_path, "'n' holds NaN or Inf", {"n": torch.tensor([1.0, float("nan")])})
    refused(tmp_path, "'n' holds integers", {"n": torch.tensor([300])}, dtypes={"n": torch.uint8})
    refused(tmp_path, "'n' is torch.int64 and cannot", {"n": torch.tensor([3])}, dtypes={"n": torch.float32})
    refused(tmp_path, "'n' cannot be stored", {"n": torch.zeros(2, dtype=torch.cfloat)})
    refused(tmp_path, "'n' cannot be stored", {"n": torch.eye(2).to_sparse()})
    refused(tmp_path, "no dtype for weights", {"n": torch.ones(2)}, dtypes=torch.int8)
    found = open_checkpoint(write_checkpoint(tmp_path / "out", large, dtypes=torch.bfloat16))
    assert torch.isfinite(found["large"]).all()


# names and ties


def test_names_and_shapes_must_be_those_of_like(tmp_path):
    like = original(tmp_path / "base")
    short = {n: t for n, t in tensors().items() if n != "scale"}
    refused(tmp_path, "1 tensors of .* were not given: scale", short, like=like)
    refused(tmp_path, r"'scale' has shape \(1,\)", short | {"scale": torch.ones(1)}, like=like)
    refused(tmp_path, "'scale' was given twice", [*tensors().items(), ("scale", torch.ones(()))], like=like)
    refused(tmp_path, "no tensors", [])
    more = write_checkpoint(tmp_path / "more", tensors() | {"head": torch.ones(1)}, like=like)
    assert "head" in open_checkpoint(more)


TIES = [("embed", "head")]


def test_a_tied_weight_is_stored_as_like_stores_it(tmp_path):
    embed = torch.randn(3, 2)
    single = original(tmp_path / "single", {"embed": embed})
    double = original(tmp_path / "double", {"embed": embed, "head": embed.clone()})

    def names(given, **options):
        folder = tmp_path / f"out{len(files(tmp_path))}"
        found = open_checkpoint(write_checkpoint(folder, given, tied=TIES, **options))
        assert all(torch.equal(found[n], embed + 1) for n in found)
        return found.names

    for given in ({"embed": embed + 1}, {"head": embed + 1}, {"embed": embed + 1, "head": embed + 1}):
        assert names(given, like=single) == ("embed",)
        assert names(given, like=double) == ("embed", "head")
        assert names(given) == ("embed", "head")
    refused(tmp_path, "tied but differ", {"embed": embed, "head": embed + 1}, tied=TIES, like=double)
    refused(tmp_path, "given twice", [("embed", embed), ("embed", embed)], tied=TIES)
    refused(tmp_path, "given twice", [("head", embed), ("head", embed)], tied=TIES, like=single)


def test_the_ties_of_a_bin_are_known_without_being_told(tmp_path):
    embed = torch.randn(3, 2)
    torch.save({"embed": embed, "head": embed, "w": torch.ones(1)}, tmp_path / "m.bin")
    like = open_checkpoint(tmp_path / "m.bin")
    out = write_checkpoint(tmp_path / "out", {"w": torch.zeros(1), "head": embed + 1}, like=like)
    assert torch.equal(open_checkpoint(out)["embed"], embed + 1)
