"""Spectral merges: accuracy over falling spectra, and a peak of memory below three times the task vectors."""

import os
import subprocess
import sys

import pytest
import torch

from bmm.anchors import Context, get
from bmm.linalg import leading_triples, polar, rounding

KNOBS = {"tsv": {}, "iso_c": {}, "iso_cts": {"common_share": 0.8}}


def falling(o, i, decades, seed):
    """(o, i) in float64 with singular values falling evenly, in logarithms, over so many decades."""
    generator = torch.Generator().manual_seed(seed)
    m = min(o, i)
    left, right = (torch.linalg.qr(torch.randn(n, m, generator=generator, dtype=torch.float64)).Q for n in (o, i))
    return left * torch.logspace(0, -decades, m, dtype=torch.float64) @ right.mT


def polar_by_svd(matrix):
    p, _, qh = torch.linalg.svd(matrix, full_matrices=False)
    return p @ qh


def by_svd(name, taus, share=0.8):
    """The published formulas (arXiv 2412.00081, 2502.04959) by full SVDs, for task vectors of full rank."""
    slots, experts = min(taus.shape[1:]), len(taus)
    own = slots // experts if name == "tsv" else min(round((1 - share) * slots / experts), slots // experts)
    u, s, vh = torch.linalg.svd(taus.sum(0), full_matrices=False)
    if name == "iso_c":
        return s.mean() * u @ vh
    common = 0 if name == "tsv" else slots - own * experts
    us, ss, vs = [u[:, :common]], [s[:common]], [vh[:common]]
    for tau in taus:
        u, s, vh = torch.linalg.svd(tau - us[0] @ us[0].mT @ tau, full_matrices=False)
        us, ss, vs = [*us, u[:, :own]], [*ss, s[:own]], [*vs, vh[:own]]
    scales = torch.cat(ss) if name == "tsv" else torch.cat(ss).mean()
    return polar_by_svd(torch.cat(us, 1)) * scales @ polar_by_svd(torch.cat(vs))


@pytest.mark.parametrize("name", KNOBS)
@pytest.mark.parametrize("shape", [(96, 160), (128, 128), (160, 96)])
@pytest.mark.parametrize("decades", [1, 4])
def test_grams_are_as_exact_as_svds_in_float64(name, shape, decades):
    """Down to singular values of 1e-4 of the largest, whose squares float64 still holds but float32 would not."""
    taus = torch.stack([falling(*shape, decades, seed) for seed in range(4)]).float()
    d = get(name).kernel(taus, Context("w", taus[0], torch.ones(4)), **KNOBS[name]).double()
    reference = by_svd(name, taus.double())
    assert (d - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50), (1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("decades", [0, 3, 6])
def test_singular_triples_of_any_ratio(shape, decades):
    """Over six decades one Gram in float64 would be off by 1e-4."""
    matrix = falling(*shape, decades, 0)
    expected = torch.linalg.svdvals(matrix)
    noise = rounding(matrix, matrix.dtype)
    for count in {1, max(1, len(expected) // 2), len(expected)}:
        u, s, v = leading_triples(matrix, count, noise)
        assert len(s) == count
        torch.testing.assert_close(s, expected[:count], rtol=1e-5, atol=0)
        rest = torch.linalg.matrix_norm(matrix - u * s @ v.mT, 2)  # what no matrix of that rank can better
        assert rest <= (1 + 1e-5) * (expected[count] if count < len(expected) else 0) + 1e-12
        eye = torch.eye(count, dtype=torch.float64)
        assert (u.mT @ u - eye).abs().max() < 1e-5
        assert (v.mT @ v - eye).abs().max() < 1e-5
    isometry, s = polar(matrix, noise)
    assert (isometry - polar_by_svd(matrix)).abs().max() < 1e-5
    torch.testing.assert_close(s, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [2, 5, 30])
def test_rounding_is_no_direction(dtype, count):
    """The product of a (40, 4) and a (4, 30) matrix has four directions, whatever its last bits say."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 4, generator=generator, dtype=dtype) @ torch.randn(4, 30, generator=generator, dtype=dtype)
    noise = rounding(matrix, dtype)
    assert len(leading_triples(matrix, count, noise)[1]) == min(count, 4)
    assert len(polar(matrix, noise)[1]) == 4
    assert len(polar(torch.zeros(3, 5), 0.0)[1]) == 0


SCRIPT = """
import sys, torch
from collections.abc import Mapping
from bmm.anchors import merge_stream
torch.set_num_threads(1)
class Made(Mapping):  # a model of one weight, made afresh whenever it is read
    def __init__(self, seed, shape): self.seed, self.shape = seed, shape
    def __getitem__(self, name): return torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed))
    def __iter__(self): return iter(["w"])
    def __len__(self): return 1
def run(*shape):
    list(merge_stream(sys.argv[1], Made(0, shape), [Made(1 + t, shape) for t in range(8)]))
def peak():  # ru_maxrss would start at that of the parent
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
run(256, 512)  # every library loaded, every path taken
before = peak()
run(256, 8192)
print((peak() - before) / (4 * 8 * 256 * 8192))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", KNOBS)
def test_peak_memory_is_below_three_times_the_task_vectors(name):
    # Blocks of a mebibyte and more go back to the system at once: on glibc's heap they leave gaps, up to a third of the
    # peak, that depend on where the system happened to put the heap.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert 0.5 < float(done.stdout) < 3
