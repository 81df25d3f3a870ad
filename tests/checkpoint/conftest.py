"""Fixtures that several files of this folder take."""

import pytest

from tests import adapters as make
from tests.checkpoint.adapted import QV


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folders of a base and of one adapter on it."""
    folder = tmp_path_factory.mktemp("llama")
    base = make.save(make.model("llama", tie_word_embeddings=False), folder / "base")
    make.adapter(make.model("llama", tie_word_embeddings=False), folder / "adapter", **QV)
    return base, folder / "adapter"
