import json
import os
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bmm.errors import GramError, WriteError
from bmm.grams import GramStore, TaskGrams, fingerprint
from bmm.grams.store import CODE_VERSION


def some_grams():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 5, generator=g, dtype=torch.float64)
    return TaskGrams(
        grams={
            "a.weight": x.T @ x,
            "c.weight": (x.T @ x).float()[:4, :4].contiguous(),
            "d.weight": (x.T @ x).bfloat16(),
        },
        key_of={"a.weight": "a.weight", "b.weight": "a.weight", "c.weight": "c.weight", "d.weight": "d.weight"},
        count={"a.weight": 50, "c.weight": 50, "d.weight": 50},
        has_bias={"a.weight": True, "c.weight": False, "d.weight": False},
        bias_of={"a.weight": "a.bias", "b.weight": "b.bias"},
        layout={"a.weight": "linear", "b.weight": "linear", "c.weight": "conv1d", "d.weight": "conv2d"},
        skipped={"e.weight": "Embedding is no Linear"},
        norms={"n.weight": torch.stack([x.T[:2, :2] @ x[:2, :2]] * 3)},
        norm_bias={"n.weight": "n.bias"},
    )


def same(a, b):
    names = ("key_of", "count", "has_bias", "bias_of", "layout", "skipped", "norm_bias")
    plain = all(getattr(a, k) == getattr(b, k) for k in names)
    return plain and all(
        one.keys() == two.keys() and all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)
        for one, two in ((a.grams, b.grams), (a.norms, b.norms))
    )


def test_round_trip(tmp_path):
    store = GramStore(tmp_path / "new" / "folder")
    assert store.load("f1") is None
    store.save("f1", some_grams())
    assert same(GramStore(store.folder).load("f1"), some_grams())
    assert store.load("f2") is None
    assert store.notices == []
    assert os.listdir(store.folder) == ["f1.safetensors"]
    store.save("f1", TaskGrams())  # nothing has a Gram: also a result
    assert same(store.load("f1"), TaskGrams())


def test_grams_are_read_when_asked_for_and_survive_a_second_write(tmp_path):
    store = GramStore(tmp_path)
    store.save("f", some_grams())
    found = store.load("f")
    assert not any(isinstance(value, torch.Tensor) for value in vars(found.grams).values())
    store.save("f", some_grams())  # by another run that collected them at the same time
    assert same(found, some_grams())
    assert same(found.joined(TaskGrams()), some_grams())
    with pytest.raises(KeyError):
        found.grams["z.weight"]


def test_every_truncation_is_noticed(tmp_path):
    store = GramStore(tmp_path)
    path = store.save("f", some_grams())
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 9, *range(10, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        store.notices.clear()
        assert store.load("f") is None
        assert len(store.notices) == 1
        assert "damaged" in store.notices[0]
    path.write_bytes(whole + b"x")
    assert store.load("f") is None
    path.write_bytes(whole)
    assert same(store.load("f"), some_grams())


def test_no_flipped_bit_is_ever_believed(tmp_path):
    store = GramStore(tmp_path)
    path = store.save("f", some_grams())
    whole = path.read_bytes()
    rng = random.Random(0)
    places = [*range(0, 16), *(rng.randrange(len(whole)) for _ in range(300)), len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        store.notices.clear()
        found = store.load("f")
        # a flip may hit padding that carries nothing: then the content must be the very same
        assert (found is None and len(store.notices) == 1) or (found is not None and same(found, some_grams()))


def test_other_versions_and_other_fingerprints_are_stale(tmp_path, monkeypatch):
    store = GramStore(tmp_path)
    store.save("f", some_grams())
    (tmp_path / "g.safetensors").write_bytes((tmp_path / "f.safetensors").read_bytes())
    assert store.load("g") is None
    assert "stale" in store.notices[-1]
    monkeypatch.setattr("bmm.grams.store.CODE_VERSION", CODE_VERSION + 1)
    assert store.load("f") is None
    assert f"stale (version {CODE_VERSION}, this is {CODE_VERSION + 1})" in store.notices[-1]
    store.save("f", some_grams())
    assert same(store.load("f"), some_grams())


def test_tampered_names_do_not_pass(tmp_path):
    store = GramStore(tmp_path)
    path = store.save("f", some_grams())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["body"] = json.dumps(json.loads(metadata["body"]) | {"bias_of": {}})
    save_file(load_file(path), path, metadata)
    assert store.load("f") is None
    assert "checksum" in store.notices[0]


def test_foreign_files_are_noticed(tmp_path):
    store = GramStore(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "f.safetensors")
    (tmp_path / "g.safetensors").mkdir()
    assert store.load("f") is None
    assert store.load("g") is None
    assert len(store.notices) == 2


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    store = GramStore(tmp_path)
    store.save("f", some_grams())

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("bmm.grams.store.os.replace", full)
    with pytest.raises(WriteError, match="no space"):
        store.save("f", TaskGrams())
    assert os.listdir(tmp_path) == ["f.safetensors"]
    assert same(store.load("f"), some_grams())


def test_a_folder_that_cannot_be_is_a_write_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot write Grams"):
        GramStore(tmp_path / "file").save("f", some_grams())


@pytest.mark.parametrize("name", ["", "../f", "a/b", "a.b", "x" * 200])
def test_fingerprints_are_plain_names(tmp_path, name):
    with pytest.raises(GramError, match="fingerprint"):
        GramStore(tmp_path).load(name)


def test_fingerprint_tells_apart_all_that_matters():
    x, y = torch.arange(6.0), torch.ones(2, 3)
    reference = fingerprint("w", [x, y], {"bias": True, "n": 4})
    assert reference == fingerprint("w", iter([x.clone(), y]), {"n": 4, "bias": True})
    others = [
        fingerprint("v", [x, y], {"bias": True, "n": 4}),
        fingerprint("w", [y, x], {"bias": True, "n": 4}),
        fingerprint("w", [x], {"bias": True, "n": 4}),
        fingerprint("w", [x.reshape(2, 3), y], {"bias": True, "n": 4}),
        fingerprint("w", [x.double(), y], {"bias": True, "n": 4}),
        fingerprint("w", [x + 1, y], {"bias": True, "n": 4}),
        fingerprint("w", [x, y], {"bias": False, "n": 4}),
    ]
    assert len({reference, *others}) == len(others) + 1
    assert fingerprint("w", [torch.ones(2, dtype=torch.bfloat16), torch.tensor([True])], {})
    with pytest.raises(GramError, match="settings"):
        fingerprint("w", [x], {"f": object()})


def test_fingerprint_depends_on_the_code_version(monkeypatch):
    before = fingerprint("w", [], {})
    monkeypatch.setattr("bmm.grams.store.CODE_VERSION", 99)
    assert fingerprint("w", [], {}) != before
