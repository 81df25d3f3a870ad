import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmm.records import Hyperparameters, Score, StudyResult, Trial

numbers = st.floats(min_value=1e-9, max_value=1e9)
names = st.text(min_size=1, max_size=8)


@given(st.dictionaries(names, st.one_of(numbers, st.just(math.inf)), min_size=1), st.floats(-2, 2))
def test_hyperparameters_survive_json(lam, rho):
    point = Hyperparameters(lam, dict.fromkeys(lam, rho))
    assert Hyperparameters.from_json(json.loads(json.dumps(point.to_json(), allow_nan=False))) == point


def result(best=0.7, anchor=0.6, experts=0.9):
    trial = Trial(0, "anchor", "completed", Hyperparameters({"q": math.inf}, {"q": 1.0}), {"a": anchor}, 0.66)
    scores = {m: [Score("a", v, 100)] for m, v in (("anchor", anchor), ("best", best), ("experts", experts))}
    return StudyResult(trial, [trial], scores, scores, {"study": "s"}, {"anchor": "tsv"}, {"open": 1.0})


def test_result_survives_json_and_measures_the_gap():
    there = result()
    assert StudyResult.from_json(json.loads(json.dumps(there.to_json()))) == there
    assert there.gap_closed() == pytest.approx(1 / 3)
    assert math.isnan(result(experts=0.6).gap_closed())


def test_standard_error():
    assert Score("a", 0.5, 100).standard_error == pytest.approx(0.05)
    assert math.isnan(Score("a", 3.2, 100).standard_error)
    assert math.isnan(Score("a", 0.5, 0).standard_error)
