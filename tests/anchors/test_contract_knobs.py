"""Every anchor method: its knobs, its task weights, and what it refuses."""

import pytest
import torch

from bmm.anchors import merge
from bmm.errors import MergeError
from tests.anchors.runs import FLOATING, assert_close, fit, run, statistics

from .models import Lazy, family, grams_for

UNSCALED = {"average", "greedy_soup", "model_stock", "slerp", "multi_slerp", "karcher"}


def test_linear_knobs_are_linear(anchor):
    base, models = family(fit(anchor, 3))
    knob = anchor.linear
    if knob is None:
        assert anchor.name in UNSCALED
        return
    one, half, none = (run(anchor, base, models, **{knob.name: v}) for v in (1.0, 0.5, 0.0))
    for name in FLOATING:
        torch.testing.assert_close(half[name] - base[name], (one[name] - base[name]) / 2, rtol=1e-4, atol=1e-6)
        assert torch.equal(none[name], base[name])


def test_every_other_knob_changes_the_result(anchor):
    base, models = family(fit(anchor, 3), size=0.01)
    grams = grams_for(base, 3)
    default = run(anchor, base, models, grams=grams)
    for knob in anchor.knobs:
        other = next(c for c in knob.choices if c != knob.default) if knob.choices else None
        if other is None:
            other = knob.low if knob.default != knob.low else knob.high
        elsewhere = run(anchor, base, models, grams=grams, **{knob.name: other})
        if knob.name == "towards":  # they differ by no more than the ridge allows
            default = run(anchor, base, models, grams=grams, ridge=0.5)
            elsewhere = run(anchor, base, models, grams=grams, ridge=0.5, towards=other)
        if anchor.name == "dare_ties" and knob.name == "density":
            assert knob.low < 1 - anchor.defaults["drop"]
        assert any(not torch.equal(default[k], elsewhere[k]) for k in FLOATING), knob.name


def test_every_bound_gives_a_finite_model(anchor):
    base, models = family(fit(anchor, 4))
    for knob in anchor.knobs:
        for value in knob.choices or (knob.low, knob.high):
            if knob.name == "steps":
                value = min(value, 10)
            merged = run(anchor, base, models, **{knob.name: value})
            assert all(torch.isfinite(v).all() for v in merged.values()), (knob.name, value)


# one of weight 2 is not the same expert twice: tsv and iso_cts share slots out among experts, a soup chooses; the
# others take maxima of a_t tau_t, or count and compare tasks
REPEATS = {"tsv", "iso_cts", "greedy_soup", "magmax", "emr", "consensus_ta", "pcb"}


def test_a_weight_of_two_counts_an_expert_twice(anchor):
    if not anchor.weights or anchor.name.removesuffix("+lines") in REPEATS:
        return
    base, (a, b) = family(fit(anchor, 2))
    grams = grams_for(base, 2)
    weighted = run(anchor, base, [a, b], grams=grams, weights=[2.0, 1.0])
    twice = run(anchor, base, [a, a, b], grams={k: [g[0], *g] for k, g in grams.items()})
    assert_close({k: weighted[k] for k in FLOATING}, {k: twice[k] for k in FLOATING}, 1e-4)


def test_an_expert_of_weight_zero_is_left_out(anchor):
    base, models = family(fit(anchor, 3))
    grams = grams_for(base, 3)
    if not anchor.weights:
        with pytest.raises(MergeError, match="takes no task weights"):
            run(anchor, base, models, grams=grams, weights=[1.0, 0.0, 1.0][: len(models)])
        return
    without = run(anchor, base, [models[0], models[2]], grams={k: [g[0], g[2]] for k, g in grams.items()})
    merged = run(anchor, base, models, grams=grams, weights=[1.0, 0.0, 1.0])
    assert all(torch.equal(merged[k], without[k]) for k in base)
    assert any(not torch.equal(merged[k], run(anchor, base, models, grams=grams)[k]) for k in FLOATING)


def test_weights_matter_and_equal_ones_change_no_mean(anchor):
    base, models = family(fit(anchor, 3))
    grams = grams_for(base, 3)
    if anchor.weights:
        one = run(anchor, base, models, grams=grams, weights=[1.0, 1.0, 1.0])
        assert all(torch.equal(one[k], run(anchor, base, models, grams=grams)[k]) for k in base)
        other = run(anchor, base, models, grams=grams, weights=[1.0, 0.25, 3.0])
        assert any(not torch.equal(one[k], other[k]) for k in FLOATING)
        if anchor.weights == "any":
            negative = run(anchor, base, models, grams=grams, weights=[1.0, -0.5, 1.0])
            assert all(torch.isfinite(v).all() for v in negative.values())


def test_weights_that_make_no_sense_are_refused(anchor):
    base, models = family(fit(anchor, 2))
    grams = grams_for(base, 2)
    bad = {"1 task weights for 2": [1.0], "finite": [float("nan"), 1.0], "all of them 0": [0.0, 0.0]}
    if anchor.weights != "any":
        bad["takes no"] = [1.0, -1.0]
    for match, weights in bad.items():
        with pytest.raises(MergeError) as error:
            run(anchor, base, models, grams=grams, weights=weights)
        assert match in str(error.value)


def test_parameters_that_require_gradients_are_accepted(anchor):
    base, models = family(fit(anchor, 2))
    grown = [{k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in m.items()} for m in (base, *models)]
    merged = run(anchor, grown[0], grown[1:])
    assert not any(v.requires_grad for v in merged.values())
    assert_close(merged, run(anchor, base, models))


def test_unknown_and_out_of_range_knobs_are_refused(anchor):
    base, models = family(fit(anchor, 2))
    with pytest.raises(MergeError, match="no knob 'temperature'"):
        run(anchor, base, models, temperature=1.0)
    for knob in anchor.knobs:
        bad = ["neither"] if knob.choices else [knob.low - 1, knob.high + 1, float("nan"), "much", True, None]
        for value in bad:
            with pytest.raises(MergeError, match=knob.name):
                run(anchor, base, models, **{knob.name: value})


def test_experts_that_do_not_agree_are_refused(anchor):
    base, models = family(fit(anchor, 2))
    grams = grams_for(base, 2)

    def refuses(match, experts, base=base, **options):
        with pytest.raises(MergeError, match=match):
            run(anchor, base, experts, grams=grams, **options)

    refuses("no expert", [])
    refuses("list of state dicts", models[0])
    refuses("holds no tensors", [{}], base={})
    refuses(r"experts\[1\] lacks norm.weight", [models[0], {k: v for k, v in models[1].items() if k != "norm.weight"}])
    refuses(r"experts\[0\] has extra, which", [models[0] | {"extra": torch.ones(1)}, models[1]])
    refuses(r"linear.weight is float32 \(6, 5\) in the base but", [models[0] | {"linear.weight": torch.ones(5, 6)}])
    refuses("steps is int64", [models[0] | {"steps": torch.ones(3)}])
    refuses(
        "; steps, token differ too",
        [{k: v[None] if k in ("bias", "steps", "token", "row.weight") else v for k, v in models[0].items()}],
    )
    refuses(r"linear.weight is .* in experts\[0\]", [Lazy(models[0] | {"linear.weight": torch.ones(5, 6)}), models[1]])
    refuses("steps is int64", [Lazy(models[0] | {"steps": torch.ones(3)}), models[1]])
    for bad in (float("nan"), float("inf")):
        broken = models[1] | {"norm.weight": torch.full((6,), bad)}
        refuses(r"norm.weight of experts\[1\] holds 6 non-finite", [models[0], broken])
    refuses("norm.weight of the base", models, base=base | {"norm.weight": torch.full((6,), float("nan"))})
    refuses("dtype is torch.int32", models, dtype=torch.int32)
    refuses("device 'abacus'", models, device="abacus")
    refuses("transposed names nothing", models, transposed=["nothing"])
    spectrum = {"spectrum": torch.zeros(2, dtype=torch.complex64)}
    refuses("spectrum is complex64", [m | spectrum for m in models], base=base | spectrum)


def test_missing_statistics_are_asked_for(anchor):
    base, models = family(fit(anchor, 2))
    given = statistics(anchor, base, models)
    nothing = {
        "grams": (None, {}, {"elsewhere.weight": [torch.eye(2)] * 2}),
        "fisher": ((), []),
        "base_fisher": (None,),
        "score": (None,),
    }
    asked = {"grams": "needs Gram matrices", "base_fisher": "Fisher of the base", "fisher": "Fisher for every expert"}
    for name in given:
        for missing in nothing[name]:
            with pytest.raises(MergeError, match=asked.get(name, "needs")):
                merge(anchor.name, base, models, **(given | {name: missing}))
    merge(anchor.name, base, models, **given)
