"""A plain merge holds about one model, not T of them."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

SCRIPT = """
import resource, sys
import bmm
bmm.merge, bmm.anchors, bmm.Task
import bmm.api
import torch
torch.set_num_threads(1)
folder = sys.argv[1]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.ones(8, 8) @ torch.ones(8, 8)
before = peak()
bmm.merge(base=f"{folder}/base.safetensors", experts={f"e{t}": f"{folder}/e{t}.safetensors" for t in range(8)},
          anchor=sys.argv[2], out=f"{folder}/merged-{sys.argv[2]}")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("anchor", ["task_arithmetic", "ties"])
def test_peak_memory_of_a_plain_merge(anchor, tmp_path):
    generator = torch.Generator().manual_seed(0)
    size = 24 * 4  # MiB: 24 tensors of 4 MiB
    for name in ("base", *(f"e{t}" for t in range(8))):
        state = {f"m{k}.weight": torch.randn(1024, 1024, generator=generator) for k in range(24)}
        save_file(state, tmp_path / f"{name}.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), anchor], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    # One model in the shard being written, and a few times the T versions of one tensor; all experts would be 768.
    assert float(done.stdout) < 2.5 * size + 4 * 8 * 4
