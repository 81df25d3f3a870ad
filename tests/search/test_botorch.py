"""What is the default engine's own: where it looks, and what it says when it fails."""

import numpy as np

from bmm.search.engines.botorch import BotorchEngine
from tests.search.problem import SPACE
from tests.search.study_rows import rows_of


def test_a_failure_is_told_in_one_line():
    class Wordy(BotorchEngine):
        def suggest(self, number, rows, tried):
            raise RuntimeError("tensor([0.1, " + "0.2, " * 100 + "\n 0.3])")

    notice = Wordy(SPACE, 0).ask(rows_of(SPACE, 9)).notice
    assert notice.startswith("BoTorch failed (RuntimeError: tensor([0.1, 0.2")
    assert len(notice) < 200
    assert "\n" not in notice


def test_candidates_stay_in_the_box_and_half_of_them_near_the_best():
    engine, box = BotorchEngine(SPACE, 0), np.stack([np.full(len(SPACE), 0.4), np.full(len(SPACE), 0.7)])
    near = np.full((1, len(SPACE)), 0.69)
    found = engine._candidates(3, box, near)
    assert ((found >= box[0]) & (found <= box[1])).all()
    half = len(found) // 2
    assert abs(found[:half].mean() - 0.55) < 0.01
    assert np.abs(found[half:] - 0.69).mean() < 0.06
    assert (found[half:] == 0.69).any(1).mean() > 0.5  # many steps move some parameters alone
    np.testing.assert_array_equal(found, BotorchEngine(SPACE, 0)._candidates(3, box, near))
