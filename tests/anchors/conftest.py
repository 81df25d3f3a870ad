"""Fixtures that several files of this folder take."""

import pytest

from bmm.anchors import ANCHORS, get
from tests.anchors.runs import WRAPPED


@pytest.fixture(params=[*ANCHORS, *WRAPPED])
def anchor(request):
    return get(request.param)
