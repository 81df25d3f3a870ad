import pytest

from tests.mergekit.models import write


@pytest.fixture
def models(tmp_path):
    """Base, and three experts that differ from it by easy numbers."""
    write(tmp_path / "base", [1.0, 2.0, 3.0, 4.0])
    write(tmp_path / "a", [2.0, 2.0, 1.0, 8.0])  # +1 0 -2 +4
    write(tmp_path / "b", [1.0, 5.0, 4.0, 3.0])  # 0 +3 +1 -1
    write(tmp_path / "c", [0.0, 1.0, 3.0, 6.0])  # -1 -1 0 +2
    return tmp_path
