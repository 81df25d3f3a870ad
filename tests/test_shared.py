"""Objects with tensors that come back from a mapped file as they were, bit for bit, view for view."""

import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from bmm.errors import WriteError
from bmm.shared import names_main, share


@dataclass(frozen=True)
class Box:
    name: str
    tensors: dict


def example():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    return Box(
        "example",
        {
            "matrix": matrix,
            "same": matrix,
            "transposed": matrix.mT,
            "slice": matrix[1:3, ::2],
            "bits": torch.arange(3, dtype=torch.int8),
            "half": torch.randn(9, generator=generator).to(torch.bfloat16),
            "flag": torch.tensor(True),
            "wide": torch.ones(1).expand(4, 3),
            "empty": torch.empty(0, 3),
            "also_empty": torch.empty(2, 0, dtype=torch.int64),
            "parameter": torch.nn.Parameter(torch.ones(2)),
            "array": np.arange(4.0),
        },
    )


@pytest.mark.parametrize("route", ["file", "array"])
def test_everything_comes_back_as_it_was(tmp_path, route):
    given = example()
    shared = share(given, tmp_path / "numbers")
    shared = pickle.loads(pickle.dumps(shared if route == "file" else shared.as_array()))
    found = shared.open()
    assert isinstance(found, Box)
    for key, tensor in given.tensors.items():
        other = found.tensors[key]
        assert type(other) is type(tensor)
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
        assert (other == tensor).all()
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            assert other.stride() == tensor.stride()
    boxed = found.tensors
    assert boxed["same"].data_ptr() == boxed["matrix"].data_ptr() == boxed["transposed"].data_ptr()
    assert boxed["parameter"].requires_grad
    assert (tmp_path / "numbers").stat().st_size < 3 * given.tensors["matrix"].nbytes  # each storage once


def test_a_change_stays_in_the_process_that_makes_it(tmp_path):
    shared = share(torch.zeros(3), tmp_path / "numbers")
    first, second = shared.open(), shared.open()
    first += 1
    assert second.tolist() == shared.open().tolist() == [0, 0, 0]


def test_a_new_file_does_not_disturb_who_maps_the_old_one(tmp_path):
    found = share(torch.arange(5), tmp_path / "numbers").open()
    newer = share(torch.zeros(1000), tmp_path / "numbers")
    assert found.tolist() == [0, 1, 2, 3, 4]
    assert newer.open().shape == (1000,)


def test_memory_is_that_of_the_map(tmp_path):
    """64 MiB opened twice and read leave a process's own memory as it was."""
    shared = share(torch.ones(2**24), tmp_path / "numbers")
    (tmp_path / "shared").write_bytes(pickle.dumps(shared))
    script = f"""
import pickle
from pathlib import Path
def own():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(l.split()[1]) for l in lines if l.startswith(("Private_Dirty", "Anonymous"))) / 1024
shared = pickle.loads(Path({str(tmp_path / "shared")!r}).read_bytes())
import torch
before = own()
first, second = shared.open(), shared.open()
assert first.sum() == second.sum() == 2**24
assert own() - before < 16, own() - before
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


def test_what_cannot_be_sent_or_written_is_an_error_and_leaves_no_file(tmp_path):
    with pytest.raises(Exception, match="lambda"):
        share([torch.ones(1), lambda: None], tmp_path / "numbers")
    with pytest.raises(WriteError, match="cannot write"):
        share(torch.ones(1), tmp_path / "absent" / "numbers")
    assert list(tmp_path.iterdir()) == []


def test_functions_of_the_running_script_are_found(monkeypatch):
    def own():
        pass

    assert not names_main(example())
    monkeypatch.setattr(own, "__module__", "__main__")
    monkeypatch.setattr(own, "__qualname__", "own")
    monkeypatch.setattr(sys.modules["__main__"], "own", own, raising=False)
    assert names_main({"forward": own})
