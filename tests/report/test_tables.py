import math

import pytest

from bmm.records import Score
from bmm.report import gap_line, markdown, mean_and_error, percent, score_table
from tests.test_records import result


def test_columns_line_up_and_numbers_stand_right():
    lines = markdown(["name", "n"], [["a", "5"], ["bcdef", "1234"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].endswith(":|")
    assert lines[2] == "| a     |    5 |"


def test_mean_of_tasks_carries_its_error():
    scores = [Score("a", 0.5, 100), Score("b", 0.9, 100)]
    mean, error = mean_and_error(scores)
    assert mean == pytest.approx(0.7)
    assert error == pytest.approx(math.hypot(0.05, 0.03) / 2)
    assert percent(mean, error) == "70.0 ± 2.9"
    assert percent(0.7, math.nan) == "70.0"
    assert percent(math.nan) == "-"
    assert "| mean" in score_table({"best": scores})


def test_gap_line_says_when_there_is_no_gap():
    assert "33.3 %" in gap_line(result(), "test")
    assert "not defined" in gap_line(result(experts=0.5), "test")
