"""Memory does not grow with the model: what users of other tools ran out of.

mergekit 341 and 549: merges of 7 B models killed for memory; fusion_bench: a RegMean of two 8 B models wanted 150 GB.
"""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

SCRIPT = """
import json, sys
import bmm, bmm.api, bmm.writing
import torch
torch.set_num_threads(1)
def peak():  # in MiB; ru_maxrss would start at that of the parent
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
torch.linalg.cholesky(torch.eye(8)); torch.eye(64) @ torch.eye(64)
before = peak()
bmm.merge(json.loads(sys.argv[1]), out=sys.argv[2], **json.loads(sys.argv[3]))
print(peak() - before)
"""
WIDTH, MATRIX, EXPERTS = 512, 1, 3  # MiB a matrix of 512 x 512


def peak(folder, layers, recipe, merge):
    """MiB that a merge of so many matrices takes over what it starts with."""
    here = folder / f"{layers}"
    if not here.exists():
        here.mkdir()
        generator = torch.Generator().manual_seed(0)
        for name in ("base", *(f"e{t}" for t in range(EXPERTS))):
            state = {f"h.{k}.weight": torch.randn(WIDTH, WIDTH, generator=generator) for k in range(layers)}
            save_file(state, here / f"{name}.safetensors")
    experts = {f"e{t}": f"{here}/e{t}.safetensors" for t in range(EXPERTS)}
    keys = {"base": f"{here}/base.safetensors", "experts": experts}
    call = [json.dumps(keys | recipe), f"{here}/{recipe['anchor']}-{len(merge)}", json.dumps(merge)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *call], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "merge"),
    [
        ({"anchor": "task_arithmetic"}, {}),
        ({"anchor": "ties"}, {}),
        ({"anchor": "tsv"}, {}),
        ({"anchor": "task_arithmetic", "grams": "datafree"}, {"lam": 1.0}),
    ],
    ids=["task arithmetic", "ties", "tsv", "bmm"],
)
def test_a_model_four_times_as_deep_takes_no_more_memory(recipe, merge, tmp_path):
    few, many = (peak(tmp_path, layers, recipe, merge) for layers in (24, 96))
    added = (96 - 24) * MATRIX * (1 + EXPERTS)
    assert many < few + 0.1 * added  # holding the merge alone would be a quarter
    assert many < 0.25 * 96 * MATRIX * (1 + EXPERTS)
