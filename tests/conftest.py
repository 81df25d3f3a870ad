"""Shared fixtures: the small family, quiet threads, a private Gram cache."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings

from tests import family as family_module

torch.set_num_threads(1)
settings.register_profile("bmm", deadline=None)  # a busy machine is no failure
settings.load_profile("bmm")


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """A base and three experts of a small convolutional net, with tasks (see tests/family.py)."""
    return family_module.build(tmp_path_factory.mktemp("family") / "f")


@pytest.fixture(scope="session")
def study(family, tmp_path_factory):
    """The result of a short study of the family; nobody writes to its folder."""
    import bmm

    out = tmp_path_factory.mktemp("study") / "run"
    return bmm.tune(family.recipe(), anchor="task_arithmetic", engine="sobol", budget=8, out=str(out))


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's own cache."""
    monkeypatch.setenv("BMM_CACHE", str(tmp_path_factory.getbasetemp() / "bmm-cache"))
