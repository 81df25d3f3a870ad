"""Large files are brought to disk window by window; every file reads back as it was written."""

import os

import pytest
import torch

from bmm.checkpoint import behind, open_checkpoint, shards, write_checkpoint


@pytest.fixture
def calls(monkeypatch):
    found = []
    monkeypatch.setattr(behind, "WINDOW", 4096)
    monkeypatch.setattr(shards, "WINDOW", 4096)
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, start, count, advice: found.append((start, count)), raising=False
    )
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    return found


def written(tmp_path, like):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"m{k}": torch.randn(3000 + k, generator=generator) for k in range(6)} | {"a": torch.ones(3)}
    start = write_checkpoint(tmp_path / "base", tensors)
    out = write_checkpoint(tmp_path / "out", tensors, like=open_checkpoint(start)) if like else start
    found = open_checkpoint(out)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    return (out / "model.safetensors").stat().st_size


def test_every_page_is_named_twice_so_that_it_is_written_and_then_dropped(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(behind, "LARGE", 1)
    size = written(tmp_path, like=True)
    pages = [sum(start <= at < start + count for start, count in calls) for at in range(0, size - 2 * 4096, 4096)]
    assert min(pages) >= 2
    assert all(count <= 4 * 4096 for _, count in calls)
    assert all(start + count <= size for start, count in calls)


def test_small_files_stay_in_the_cache(tmp_path, calls):
    written(tmp_path, like=True)
    assert not calls


def test_a_system_without_the_call(tmp_path, monkeypatch):
    monkeypatch.setattr(behind, "LARGE", 1)
    monkeypatch.setattr(behind, "WINDOW", 4096)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    written(tmp_path, like=True)
