"""Writing checkpoints: round trips, dtypes, ties, atomicity under kills and failures, transformers."""

import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from bmm.checkpoint import open_checkpoint, write_checkpoint
from bmm.errors import CheckpointError, WriteError


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


# places


def test_places_that_are_taken_are_refused_before_any_tensor_is_made(tmp_path, monkeypatch):
    def stream():
        raise AssertionError("asked for a tensor")
        yield

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note.txt").write_text("mine")
    refused(tmp_path, "not empty", stream())
    refused(tmp_path, "more, or other, than a model's files", stream(), overwrite=True)
    save_file({"a": torch.ones(1)}, tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "sub").mkdir()
    refused(tmp_path, "more, or other, than a model's files", stream(), overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="a file is in the way"):
        write_checkpoint(tmp_path / "file", stream())
    with pytest.raises(WriteError, match="cannot be written"):
        write_checkpoint(tmp_path / "file" / "out", {"a": torch.ones(1)})
    monkeypatch.chdir(tmp_path / "out" / "sub")
    for here in (".", "..", "/"):
        with pytest.raises(WriteError, match="current folder"):
            write_checkpoint(here, stream(), overwrite=True)
    for name in ("../up", "", "..", "a/b", "x.safetensors", "model.safetensors.index.json"):
        refused(tmp_path, "extra file", stream(), extra_files={name: ""})
    refused(tmp_path, "max_shard_bytes", stream(), max_shard_bytes=0)
    assert (tmp_path / "out" / "note.txt").read_text() == "mine"


def test_overwriting_replaces_the_folder_only_when_the_new_one_is_complete(tmp_path):
    out = write_checkpoint(tmp_path / "out", {"old": torch.ones(2)}, extra_files={"README.md": "old"})

    def broken():
        yield "new", torch.ones(3)
        assert open_checkpoint(out).names == ("old",)
        raise RuntimeError("merge failed")

    with pytest.raises(RuntimeError, match="merge failed"):
        write_checkpoint(out, broken(), overwrite=True)
    assert files(tmp_path) == ["out"]
    assert open_checkpoint(out).names == ("old",)
    write_checkpoint(out, {"new": torch.ones(3)}, overwrite=True)
    assert files(tmp_path) == ["out"]
    assert files(out) == ["model.safetensors"]
    assert open_checkpoint(out).names == ("new",)


def test_an_input_is_never_overwritten(tmp_path):
    like = original(tmp_path / "base")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    for place in ("base", "link"):
        with pytest.raises(WriteError, match="overlaps the input"):
            write_checkpoint(tmp_path / place, tensors(), like=like, overwrite=True)
    assert like.fingerprint()


# failures


def test_a_folder_filled_during_the_write_is_left_alone(tmp_path):
    def stream():
        yield "a", torch.ones(1)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("theirs")

    with pytest.raises(WriteError) as caught:
        write_checkpoint(tmp_path / "out", stream())
    assert "filled during the write" in caught.value.hint
    assert files(tmp_path / "out") == ["theirs"]
    assert files(tmp_path) == ["out"]


def test_a_temporary_folder_that_vanishes_is_an_error(tmp_path):
    def stream():
        yield "a", torch.ones(1)
        next(tmp_path.glob(".out.incomplete-*")).rmdir()

    refused(tmp_path, "cannot be written", stream())


def test_a_full_disk_is_a_write_error_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes past the limit then fail as on a full disk
    large = {"a": torch.ones(1), "b": torch.ones(5000)}
    like = original(tmp_path / "base", large)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        refused(tmp_path, r"out: cannot be written \(.*[Tt]oo large", large)
        refused(tmp_path, r"out: cannot be written \(.*[Tt]oo large", large, like=like)
        refused(tmp_path, "too large", {"a": torch.ones(1)}, extra_files={"README.md": "x" * 20_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_parent_is_a_write_error(tmp_path):
    tmp_path.chmod(0o500)
    try:
        refused(tmp_path, "Permission denied", tensors())
    finally:
        tmp_path.chmod(0o700)


def test_a_file_system_that_takes_no_folders_is_a_write_error():
    with pytest.raises(WriteError, match="cannot be written"):
        write_checkpoint("/proc/bmm/out", tensors())


WRITE = """
import sys, torch
from bmm.checkpoint import write_checkpoint
def stream():
    for i in range(200):
        yield f"t{i}", torch.full((50, 50), float(i))
        print(i, flush=True)
write_checkpoint(sys.argv[1], stream(), max_shard_bytes=30_000, extra_files={"README.md": "x"}, overwrite=True)
print("done", flush=True)
"""


@pytest.mark.parametrize("line", [0, 60, 199])
@pytest.mark.parametrize("existing", [False, True])
def test_a_write_killed_at_any_point_leaves_no_folder_that_looks_complete(tmp_path, line, existing):
    out = tmp_path / "out"
    if existing:
        write_checkpoint(out, {"old": torch.ones(1)})
    process = subprocess.Popen([sys.executable, "-c", WRITE, out], stdout=subprocess.PIPE, text=True)
    for text in process.stdout:
        if text.strip() == str(line):
            break
    if line == 199:
        time.sleep(0.004)  # between the last tensor and the swap, or just past it
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    for folder in tmp_path.glob(".out.incomplete-*"):
        with pytest.raises(CheckpointError, match="cut off"):
            open_checkpoint(folder)
    if out.exists():
        names = open_checkpoint(out).names
        assert names == ("old",) if existing and line != 199 else names == ("old",) or len(names) == 200
        assert line == 199 or existing
    elif existing:  # at worst the old folder lies beside its place, complete
        assert open_checkpoint(next(tmp_path.glob(".out.replaced-*"))).names == ("old",)
    for _ in range(2):  # and nothing that was left stands in the way of the next write
        assert open_checkpoint(write_checkpoint(out, {"new": torch.ones(1)}, overwrite=True)).names == ("new",)


# transformers


@pytest.fixture(scope="module", params=["bert", "vit"])
def pretrained(request):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    if request.param == "bert":
        network = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, **small))
        return network.eval(), {"input_ids": torch.arange(12).reshape(2, 6)}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **small)
    generator = torch.Generator().manual_seed(1)
    return transformers.ViTForImageClassification(config).eval(), {
        "pixel_values": torch.randn(2, 3, 8, 8, generator=generator)
    }


@pytest.mark.parametrize("form", ["single", "shards", "bin"])
def test_transformers_loads_what_is_written_after_reading_what_it_saved(pretrained, form, tmp_path):
    network, inputs = pretrained
    base = tmp_path / "base"
    network.save_pretrained(base, max_shard_size="8KB" if form == "shards" else "1GB")
    if form == "bin":  # as older releases saved it: every name, the tied ones sharing storage
        (base / "model.safetensors").unlink()
        torch.save(network.state_dict(), base / "pytorch_model.bin")
    checkpoint = open_checkpoint(base)
    assert len(list(base.glob("model-*.safetensors"))) > 1 or form != "shards"
    written = write_checkpoint(tmp_path / "out", checkpoint.items(), like=checkpoint, max_shard_bytes=6_000)
    assert len(list(written.glob("model-*.safetensors"))) > 1
    assert open_checkpoint(written).fingerprint() == checkpoint.fingerprint()
    loaded, report = type(network).from_pretrained(written, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(**inputs).logits, network(**inputs).logits)


def test_a_tied_bert_stays_tied_through_reading_and_writing(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    network = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=20, **sizes))
    network.save_pretrained(tmp_path / "base")
    torch.save(network.state_dict(), tmp_path / "state.bin")
    head, embedding = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
    stored = open_checkpoint(tmp_path / "base")
    assert head not in stored
    groups = open_checkpoint(tmp_path / "state.bin").tied
    assert (embedding, head) in groups
    changed = {name: stored[name] + 1 if stored.info(name).floating else stored[name] for name in stored}
    write_checkpoint(tmp_path / "out", changed, like=stored, tied=groups)
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
    parameters = dict(loaded.named_parameters(remove_duplicate=False))
    assert parameters[head] is parameters[embedding]
    assert torch.equal(parameters[head], changed[embedding])
