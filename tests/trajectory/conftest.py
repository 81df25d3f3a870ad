"""Fixtures that several files of this folder take."""

import pytest
import torch

from tests.trajectory.checkpoints import SOURCE, STEPS, save, state


@pytest.fixture
def run(tmp_path):
    """A run's folder with checkpoints 50, 100, 200 and 1000 (whose names do not sort in that order)."""
    for step in STEPS:
        save(tmp_path / "run" / f"checkpoint-{step}", state(step))
    return tmp_path / "run"


@pytest.fixture(scope="module")
def convolutional(tmp_path_factory):
    """Three checkpoints of a small net with BatchNorm, and the file of its model and tasks."""
    folder = tmp_path_factory.mktemp("bn")
    (folder / "net.py").write_text(SOURCE)
    space = {}
    exec(SOURCE, space)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = space["Net"]()
        for step in (10, 20, 30):
            net.train()
            for parameter in net.parameters():
                parameter.data += 0.2 * torch.randn_like(parameter)
            net(torch.randn(16, 1, 8, 8))
            save(folder / "run" / f"checkpoint-{step}", net.state_dict())
    return folder, space
