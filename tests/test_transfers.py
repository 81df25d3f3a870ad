"""Merges for a device: what they read comes from the thread that reads ahead, and the result is the same. No GPU needed
but for the last tests."""

import threading

import pytest
import torch
from safetensors.torch import save_file

from bmm import streamed
from bmm.anchors import inputs, merge, merge_stream
from bmm.checkpoint import Checkpoint, ModelPool, open_checkpoint, staging
from bmm.errors import CheckpointError, MergeError
from bmm.records import Hyperparameters
from bmm.streamed import StreamedMerge

from .anchors.models import family

METHODS = ["task_arithmetic", "ties", "dare_ta", "average", "tsv", "pcb", "task_arithmetic+lines"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def models(tmp_path):
    base, experts = family(3, dtype=torch.bfloat16)
    for k, model in enumerate((base, *experts)):
        save_file(model, tmp_path / f"m{k}.safetensors")
    return [open_checkpoint(tmp_path / f"m{k}.safetensors") for k in range(4)]


@pytest.fixture
def readers(monkeypatch):
    """The threads that read, with what they read."""
    found = []
    fill = Checkpoint.fill

    def noting(self, name, start, out):
        found.append((threading.current_thread().name, name))
        fill(self, name, start, out)

    monkeypatch.setattr(Checkpoint, "fill", noting)
    return found


@pytest.fixture
def as_a_device(monkeypatch):
    """Have the CPU treated as a device that computes apart."""
    monkeypatch.setattr(inputs, "apart", lambda device: True)
    monkeypatch.setattr(streamed, "apart", lambda device: True)
    monkeypatch.setattr(inputs, "PIECE", 16)


def still_reading():
    return any(thread.name == "prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("name", METHODS)
def test_plain_merges_are_the_same_read_ahead(name, models, monkeypatch, readers):
    monkeypatch.setattr(inputs, "PIECE", 16)
    expected = merge(name, models[0], models[1:])
    monkeypatch.setattr(inputs, "apart", lambda device: True)
    readers.clear()
    found = merge(name, models[0], models[1:])
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert "prefetch" in {thread for thread, _ in readers}
    assert not still_reading()


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "tsv"])
def test_every_read_is_ahead_where_the_order_is_known(name, models, as_a_device, readers):
    merge(name, models[0], models[1:])
    assert {thread for thread, _ in readers} == {"prefetch"}


def test_errors_are_those_of_a_merge_that_does_not_read_ahead(tmp_path, as_a_device):
    base, experts = family(2, dtype=torch.bfloat16)
    experts[1]["wide.weight"][1, 2] = float("nan")
    for k, model in enumerate((base, *experts)):
        save_file(model, tmp_path / f"m{k}.safetensors")
    opened = [open_checkpoint(tmp_path / f"m{k}.safetensors") for k in range(3)]
    with pytest.raises(MergeError, match=r"wide\.weight of experts\[1\] holds 1 non-finite"):
        merge("task_arithmetic", opened[0], opened[1:])
    assert not still_reading()


def test_a_file_that_is_cut_midway_is_an_error_and_ends_the_reading(models, as_a_device, monkeypatch):
    monkeypatch.setattr(inputs, "Staging", lambda *args: staging.Staging(*args, limit=1))
    pairs = merge_stream("task_arithmetic", models[0], models[1:])
    next(pairs)
    path = models[2].path
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="changed after it was opened"):
        list(pairs)
    assert not still_reading()


def test_a_merge_that_is_left_alone_reads_no_more(models, as_a_device, monkeypatch):
    monkeypatch.setattr(inputs, "Staging", lambda *args: staging.Staging(*args, limit=1))
    pairs = merge_stream("task_arithmetic", models[0], models[1:])
    next(pairs)
    assert still_reading()
    pairs.close()
    assert not still_reading()


@pytest.mark.parametrize("lam", [1.0, float("inf")])
def test_modules_are_the_same_read_ahead(lam, models, monkeypatch, readers):
    streaming = StreamedMerge(ModelPool(models[0], models[1:]), source="datafree")
    point = Hyperparameters(dict.fromkeys(streaming.groups, lam), dict.fromkeys(streaming.groups, 0.7))

    def merged():
        anchor = merge_stream("task_arithmetic", models[0], models[1:], dtype=torch.float32)
        return dict(streaming.at(point, ((n, t) for n, t in anchor if n != "empty"), done=["empty"]))

    expected = merged()
    monkeypatch.setattr(streamed, "apart", lambda device: True)
    readers.clear()
    found = merged()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert {thread for thread, _ in readers} == ({"prefetch"} if lam == 1 else set())
    assert not still_reading()


@needs_gpu
def test_memory_is_pinned_and_merges_agree_with_the_processor(models, monkeypatch):
    link = staging._Link(torch.device("cuda"))
    assert link.room(8, torch.bfloat16).is_pinned()
    wide = [dict.fromkeys(["w"], torch.randn(3000, 2000).bfloat16()) for _ in range(4)]
    for name in METHODS:
        for given in (models, wide):
            found = merge(name, given[0], given[1:], device="cuda")
            expected = merge(name, given[0], given[1:])
            for key, tensor in expected.items():
                torch.testing.assert_close(found[key].float(), tensor.float(), rtol=1e-2, atol=1e-4)


@needs_gpu
def test_many_pieces_through_few_buffers(tmp_path):
    """More than the allocator of pinned memory holds at once: none is given out again before its copy has ended."""
    generator = torch.Generator().manual_seed(0)
    paths = []
    for k in range(3):
        paths.append(tmp_path / f"m{k}.safetensors")
        save_file({f"w{j}": torch.randn(1 << 22, generator=generator).bfloat16() for j in range(12)}, paths[-1])
    opened = [open_checkpoint(path) for path in paths]
    found = merge("task_arithmetic", opened[0], opened[1:], device="cuda", scale=1.0)
    expected = merge("task_arithmetic", opened[0], opened[1:], scale=1.0)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key].float(), tensor.float(), rtol=1e-2, atol=1e-4)
