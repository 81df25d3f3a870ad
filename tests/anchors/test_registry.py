"""The table of methods, and what its knobs accept."""

import re

import pytest

from bmm.anchors import ANCHORS, Anchor, Knob, get, matrix_shape, merge, resolve_knobs
from bmm.anchors.anchor import NEEDS
from bmm.errors import MergeError

from .models import family

SCALE = Knob("scale", 1.0, 0.0, 2.0, "float", "a factor")
STEPS = Knob("steps", 3, 1, 10, "int", "a number")
REDUCE = Knob("reduce", "mean", None, None, "choice", "a choice", choices=("mean", "sum"))


def test_the_first_set_is_registered():
    assert set(ANCHORS) >= {
        *("average", "task_arithmetic", "ties", "dare_ta", "dare_ties", "tsv"),
        *("iso_c", "iso_cts", "wudi", "wudi_exact", "regmean"),
    }


@pytest.mark.parametrize("name", ANCHORS)
def test_rows_are_complete(name):
    anchor = ANCHORS[name]
    assert anchor.name == name
    assert anchor.title
    assert anchor.summary.endswith(".")
    assert re.match(r"\d{4}\.\d{5}, \S", anchor.paper)
    assert anchor.needs <= set(NEEDS)
    assert anchor.formula
    assert anchor.cost
    assert anchor.when
    assert anchor.weights in ("", "positive", "any")
    assert anchor.kernel.__doc__
    assert len({knob.name for knob in anchor.knobs}) == len(anchor.knobs)
    assert sum(knob.linear for knob in anchor.knobs) <= 1
    for knob in anchor.knobs:
        assert knob.help
        assert knob.validate(knob.default) == knob.default
        assert knob.parse(str(knob.default)) == knob.default
        if knob.kind == "choice":
            assert len(knob.choices) > 1
        else:
            assert knob.low <= knob.default <= knob.high


def test_a_new_method_is_one_row(monkeypatch):
    def largest(taus, context, *, power):
        assert context.w0.shape == taus.shape[1:]
        return taus.gather(0, taus.abs().argmax(0, keepdim=True))[0] * power

    row = Anchor(
        "largest", "Largest entry", "2407.06322, MagMax", "Largest.", (Knob("power", 1.0, 0, 9, "float", "x"),), largest
    )
    monkeypatch.setitem(ANCHORS, "largest", row)
    base, models = family(2)
    merged = merge("largest", base, models, power=2)
    a, b = (m["norm.weight"] - base["norm.weight"] for m in models)
    expected = base["norm.weight"] + 2 * a.where(a.abs() >= b.abs(), b)
    assert (merged["norm.weight"] - expected).abs().max() < 1e-6


def test_unknown_methods_are_answered_with_the_closest():
    with pytest.raises(MergeError, match="did you mean") as error:
        get("tie")
    assert "ties" in error.value.hint
    with pytest.raises(MergeError, match="known: "):
        merge("qqqq", {}, [])


def test_resolve_knobs_fills_defaults_and_converts():
    assert resolve_knobs(get("ties"), {"density": 1}) == {"density": 1.0, "reduce": "mean", "scale": 1.0}
    assert isinstance(resolve_knobs(get("ties"), {"density": 1})["density"], float)
    assert isinstance(resolve_knobs(get("wudi"), {"steps": 10.0})["steps"], int)
    assert resolve_knobs(get("average"), {}) == {}


def test_resolve_knobs_refuses_what_is_not_there():
    with pytest.raises(MergeError, match="anchor ties has no knob 'densty'") as error:
        resolve_knobs(get("ties"), {"densty": 0.1})
    assert error.value.hint == "did you mean density?"
    with pytest.raises(MergeError, match="average has no knobs"):
        resolve_knobs(get("average"), {"scale": 1.0})
    with pytest.raises(MergeError, match="anchor ties: density = 2 is out of range") as error:
        resolve_knobs(get("ties"), {"density": 2})
    assert "0.001 to 1" in error.value.hint
    with pytest.raises(MergeError, match="anchor ties: reduce = 'means'") as error:
        resolve_knobs(get("ties"), {"reduce": "means"})
    assert error.value.hint == "did you mean mean?"


@pytest.mark.parametrize(
    ("knob", "value", "expected"),
    [(SCALE, 0, 0.0), (SCALE, 2, 2.0), (STEPS, 10, 10), (STEPS, 2.0, 2), (REDUCE, "sum", "sum")],
)
def test_values_that_knobs_take(knob, value, expected):
    got = knob.validate(value)
    assert got == expected
    assert type(got) is type(expected)
    assert knob.parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        *((SCALE, value) for value in (2.1, -1e-9, float("inf"), "1", True, None, [1])),
        *((STEPS, value) for value in (0, 11, 2.5)),
        *((REDUCE, value) for value in ("max", 1, None)),
    ],
)
def test_values_that_knobs_refuse(knob, value):
    with pytest.raises(MergeError, match=knob.name):
        knob.validate(value)


@pytest.mark.parametrize(
    ("knob", "text"), [(SCALE, "one"), (SCALE, "3"), (STEPS, "2.5"), (REDUCE, "maen"), (SCALE, "")]
)
def test_text_that_knobs_refuse(knob, text):
    with pytest.raises(MergeError, match=knob.name):
        knob.parse(text)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), None),
        ((5,), None),
        ((3, 5), (3, 5)),
        ((1, 5), (1, 5)),
        ((4, 3, 2, 2), (4, 12)),
        ((4, 3, 2), (4, 6)),
        ((1, 3, 2, 2), (1, 12)),
        ((1, 17, 8), (17, 8)),
        ((1, 1, 8), None),
    ],
)
def test_what_is_a_matrix(shape, expected):
    assert matrix_shape(shape) == expected
