"""What every registered anchor must do, whatever its formula."""

from dataclasses import replace

import pytest
import torch

from bmm.anchors import ANCHORS, get, merge, merge_stream
from tests.anchors.runs import FLOATING, assert_close, fit, run, statistics

from .models import SHAPES, Lazy, family, grams_for

# knobs at which one expert is returned as it is; iso_c and iso_cts have none, they flatten the spectrum
IDENTITIES = {
    "average": {},
    "task_arithmetic": {"scale": 1.0},
    "ties": {"density": 1.0},
    "dare_ta": {"drop": 0.0, "scale": 1.0},
    "dare_ties": {"drop": 0.0, "density": 1.0},
    "tsv": {},
    "wudi": {},
    "wudi_exact": {},
    "regmean": {},
    "mats": {},
    "fisher": {},
    "gradient_matching": {"coefficient": 1.0},
    "breadcrumbs": {"beta": 0.0, "gamma": 1.0, "scale": 1.0},
    "della": {"drop": 0.0, "scale": 1.0},
    "magmax": {"scale": 1.0},
    "consensus_ta": {"scale": 1.0},
    "pcb": {"balance": "paper", "ratio": 1.0},
    "emr": {},
    "model_stock": {},
    "multi_slerp": {},
    "karcher": {},
    "greedy_soup": {},
    "task_arithmetic+lines": {"lines_beta": 0.0},
    "regmean_pp": {},
}


PASSES = {"fisher": 1, "pcb": 5}  # with the merge itself; the scan of fisher reads no task vectors


@pytest.mark.parametrize("experts", [1, 2, 5, 33])
def test_names_shapes_dtypes_and_finite_values(anchor, experts):
    base, models = family(fit(anchor, experts))
    merged = run(anchor, base, models)
    assert list(merged) == list(base)
    for name in base:
        assert merged[name].shape == base[name].shape
        assert merged[name].dtype == base[name].dtype
        assert merged[name].is_contiguous()
        assert torch.isfinite(merged[name]).all()
    assert any(not torch.equal(merged[name], base[name]) for name in FLOATING)


def test_inputs_are_left_alone_and_not_shared(anchor):
    base, models = family(fit(anchor, 3))
    before = [{k: v.clone() for k, v in model.items()} for model in (base, *models)]
    merged = run(anchor, base, models)
    for tensor in merged.values():
        tensor.zero_()
    for model, copy in zip((base, *models), before, strict=True):
        assert all(torch.equal(model[k], copy[k]) for k in model)


def test_twice_the_same(anchor):
    base, models = family(fit(anchor, 4))
    first, second = run(anchor, base, models), run(anchor, base, models)
    assert all(torch.equal(first[k], second[k]) for k in base)


def test_global_random_state_is_neither_used_nor_moved(anchor):
    base, models = family(fit(anchor, 3))
    torch.manual_seed(1)
    first, state = run(anchor, base, models), torch.get_rng_state()
    torch.manual_seed(2)
    second = run(anchor, base, models)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[k], second[k]) for k in base)


@pytest.mark.parametrize("experts", [2, 5, 12])
def test_order_of_experts_does_not_matter(anchor, experts):
    experts = fit(anchor, experts)
    base, models = family(fit(anchor, experts))
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(3)).tolist()
    if order == sorted(order):
        order.reverse()
    grams = grams_for(base, experts)
    one = run(anchor, base, models, grams=grams)
    permuted = {k: [v[t] for t in order] for k, v in grams.items()}
    assert_close(one, run(anchor, base, [models[t] for t in order], grams=permuted))


def test_order_of_tensors_does_not_matter(anchor):
    base, models = family(fit(anchor, 3))
    names, grams = sorted(base, reverse=True), grams_for(base, 3)
    backwards = run(anchor, {k: base[k] for k in names}, models, grams=grams)
    assert_close(run(anchor, base, models, grams=grams), {k: backwards[k] for k in base})


def test_zero_task_vectors_give_the_base_exactly(anchor):
    base, _ = family(fit(anchor, 1))
    merged = run(anchor, base, [{k: v.clone() for k, v in base.items()} for _ in range(fit(anchor, 3))])
    assert all(torch.equal(merged[k], base[k]) for k in base)


def test_a_base_among_the_experts(anchor):
    base, models = family(fit(anchor, 3) - 1)
    merged = run(anchor, base, [*models, base])
    assert all(torch.isfinite(v).all() for v in merged.values())


def test_identical_experts_are_finite_and_stable(anchor):
    """Linearly dependent directions must not be filled up with arbitrary ones: nothing outside the one expert's
    row and column spaces may appear."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(8, 6, generator=generator)}
    tau = torch.outer(torch.randn(8, generator=generator), torch.randn(6, generator=generator))
    merged = run(anchor, base, [{"w": base["w"] + tau}] * fit(anchor, 4), grams={"w": [torch.eye(6)] * 4})
    d = merged["w"] - base["w"]
    assert torch.isfinite(d).all()
    if anchor.matrices and anchor.name != "wudi":  # Adam steps along the axes of the entries, out of any subspace
        unit = tau / tau.norm()
        assert (d - (d * unit).sum() * unit).norm() < 1e-4 * tau.norm()


@pytest.mark.parametrize("name", IDENTITIES)
def test_one_expert_is_returned(name):
    base, (expert,) = family(1)
    merged = run(get(name), base, [expert], **IDENTITIES[name])
    assert_close({k: merged[k] for k in FLOATING}, {k: expert[k] for k in FLOATING})


def test_integer_buffers_come_from_the_base(anchor):
    base, models = family(fit(anchor, 3))
    assert not torch.equal(models[0]["steps"], base["steps"])
    assert torch.equal(run(anchor, base, models)["steps"], base["steps"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_storage_dtypes(anchor, dtype):
    base, models = family(fit(anchor, 3), dtype=dtype)
    merged = run(anchor, base, models)
    assert all(merged[k].dtype == base[k].dtype for k in base)
    wide = run(anchor, base, models, dtype=torch.float32)
    assert all(wide[k].dtype == torch.float32 for k in FLOATING)
    for name in FLOATING:
        torch.testing.assert_close(wide[name].to(dtype), merged[name], rtol=1e-6, atol=1e-6)
    if dtype == torch.float64 and "drop" in anchor.defaults:
        return  # masks go by the content of task vectors, bit by bit
    base, *models = ({k: v.float() if v.is_floating_point() else v for k, v in m.items()} for m in (base, *models))
    exact = run(anchor, base, models)
    for name in FLOATING:
        torch.testing.assert_close(wide[name], exact[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_near_the_limit_of_the_format_stay_finite(anchor, dtype):
    limit = torch.finfo(dtype).max
    generator = torch.Generator().manual_seed(0)
    models = [
        {k: (0.98 * limit * (2 * torch.rand(s, generator=generator) - 1)).to(dtype) for k, s in SHAPES.items()}
        for _ in range(1 + fit(anchor, 3))
    ]
    merged = run(anchor, models[0], models[1:])
    assert all(torch.isfinite(v).all() for v in merged.values())


def test_tensors_without_matrix_form_are_averaged_by_matrix_methods(anchor):
    base, models = family(fit(anchor, 3))
    merged, mean = run(anchor, base, models), merge("average", base, models)
    if anchor.matrices and anchor.wrapped is None:
        assert_close(*({k: m[k] for k in ("token", "norm.weight", "temperature")} for m in (merged, mean)))


def test_a_convolution_is_the_matrix_of_its_patches(anchor):
    base, models = family(fit(anchor, 3))
    base, *models = ({"w": m["conv.weight"]} for m in (base, *models))
    flat_base, *flat_models = ({"w": m["w"].flatten(1)} for m in (base, *models))
    grams = grams_for({"w.weight": base["w"]}, 3)["w.weight"]
    merged = run(anchor, base, models, grams={"w": grams})
    flat = run(anchor, flat_base, flat_models, grams={"w": grams})
    if "drop" in anchor.defaults:  # entries are drawn in the tensor's own shape, in the same order
        assert merged["w"].flatten(1).shape == flat["w"].shape
    assert_close({"w": merged["w"].flatten(1)}, flat)


def test_transposed_weights_merge_as_their_transpose(anchor):
    base, models = family(fit(anchor, 3))
    name = "wide.weight"
    grams = {name: grams_for(base, 3)[name]}
    base, *models = ({name: m[name]} for m in (base, *models))
    straight = run(anchor, base, models, grams=grams)
    turned = run(
        anchor,
        {name: base[name].mT.contiguous()},
        [{name: m[name].mT.contiguous()} for m in models],
        grams=grams,
        transposed=[name],
        **({"drop": 0.0} if "drop" in anchor.defaults else {}),
    )
    if "drop" in anchor.defaults:
        straight = run(anchor, base, models, drop=0.0)
    assert_close(straight, {name: turned[name].mT.contiguous()})


def test_each_tensor_is_read_once_for_every_pass(anchor):
    if "score" in anchor.needs:
        return  # candidates are read as the score asks for them
    base, models = family(fit(anchor, 3))
    lazy_base, lazy_models = Lazy(base), [Lazy(m) for m in models]
    phases = {}
    grams = grams_for(base, 3)
    stream = merge_stream(
        anchor.name,
        lazy_base,
        lazy_models,
        **(statistics(anchor, base, models) | {"grams": grams}),
        progress=lambda phase, done, total: phases.update({phase: (done, total)}),
    )
    merged = dict(stream)
    assert_close(merged, run(anchor, base, models, grams=grams))
    passes = (1 if anchor.scan is None else PASSES.get(anchor.name, 4)) + (anchor.wrapped is not None)
    assert len(phases) == passes
    assert set(phases.values()) == {(len(base), len(base))}
    for mapping in (lazy_base, *lazy_models):
        assert set(mapping.reads.values()) == {passes}
        assert set(mapping.reads) == set(base)


@pytest.mark.parametrize("anchor", [a for a in ANCHORS.values() if a.scan is None], ids=lambda a: a.name)
def test_streaming_reads_a_tensor_when_it_is_asked_for(anchor):
    base, models = family(fit(anchor, 2))
    lazy = Lazy(base)
    stream = merge_stream(anchor.name, lazy, models, **statistics(anchor, base, models))
    before = lazy.reads.total()
    next(stream)
    assert (before, lazy.reads.total()) == (0, 1)


def test_tied_tensors_come_out_as_one(anchor):
    base, models = family(fit(anchor, 3))
    for model in (base, *models):
        model["head.weight"] = model["linear.weight"]
    merged = run(anchor, base, models)
    assert merged["head.weight"] is merged["linear.weight"]
    for model in (base, *models):
        del model["head.weight"]
    assert_close({k: merged[k] for k in base}, run(anchor, base, models))


def test_inputs_of_mixed_precision_are_merged_in_the_widest():
    base, third = {"w": torch.zeros(3)}, torch.full((3,), 1 / 3, dtype=torch.float64)
    for experts in ([{"w": third}], [{"w": third.float()}, {"w": 2 * third - third.float()}]):
        assert torch.equal(merge("average", base, experts, dtype=torch.float64)["w"], third)


def test_a_large_expert_of_a_small_base_is_merged_in_float64():
    base, large = {"w": torch.ones(4)}, torch.finfo(torch.float32).max
    merged = merge("task_arithmetic", base, [{"w": torch.full((4,), large)}] * 4, scale=0.25)
    torch.testing.assert_close(merged["w"], torch.full((4,), large))


def test_views_come_out_contiguous(anchor):
    base, models = family(fit(anchor, 2))
    grams = {"w": grams_for(base, 2)["wide.weight"]}
    base, *models = ({"w": m["wide.weight"].mT.contiguous().mT} for m in (base, *models))
    assert run(anchor, base, models, grams=grams)["w"].is_contiguous()


def test_scans_see_every_floating_tensor_that_is_not_empty(monkeypatch):
    seen = []

    def scan(stream, knobs, whole):
        assert whole.weights.tolist() == [1, 1]
        seen.extend((name, tuple(taus.shape)) for name, taus in stream)
        return len(seen)

    def kernel(taus, context):
        assert context.state == len(seen)
        return taus.sum(0)

    monkeypatch.setitem(ANCHORS, "seen", replace(ANCHORS["average"], name="seen", kernel=kernel, scan=scan))
    base, models = family(2)
    merge("seen", base, models)
    assert seen == [(name, (2, *shape)) for name, shape in SHAPES.items() if name != "empty"]
