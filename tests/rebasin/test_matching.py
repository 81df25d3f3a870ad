"""Weight matching against enumeration and an independent implementation, and its promises."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from bmm.errors import MergeError
from bmm.rebasin import Group, Permutation, Site, Spec, match


def chain(widths):
    """The spec of an MLP with weights w0, w1, ... and biases b0, b1, ..."""
    return Spec(tuple(
        Group(f"h{k}", n, (Site(f"w{k}", 0), Site(f"b{k}", 0), Site(f"w{k + 1}", 1)))
        for k, n in enumerate(widths[1:-1])
    ))  # fmt: skip


def weights(widths, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    found = {}
    for k, (i, o) in enumerate(itertools.pairwise(widths)):
        found[f"w{k}"] = torch.randn(o, i, generator=g).to(dtype)
        found[f"b{k}"] = torch.randn(o, generator=g).to(dtype)
    return found


def product(a, b, spec):
    return sum(float((a[n].double() * b[n].double()).sum()) for n in spec.tensors)


def test_by_hand():
    """Two units, swapped: <A, B> = 1 * 0.5 * 2 crosswise rises to 4 + 9 + 4 + 9 in order."""
    a = {"w0": torch.tensor([[2.0], [3.0]]), "b0": torch.zeros(2), "w1": torch.tensor([[2.0, 3.0]])}
    b = {"w0": torch.tensor([[3.0], [2.0]]), "b0": torch.zeros(2), "w1": torch.tensor([[3.0, 2.0]])}
    found = match(a, [b], chain([1, 2, 1]))
    assert found.permutations[0].arrangements["h0"].outer.tolist() == [1, 0]
    assert found.history == (24.0, 26.0, 26.0)
    assert found.permutations[0].moved == 1
    assert found.similarity == ((pytest.approx(24 / 26), pytest.approx(1)),)


def test_one_hidden_layer_is_the_global_optimum_by_enumeration():
    widths, spec = [3, 5, 2], chain([3, 5, 2])
    for seed in range(5):
        a, b = weights(widths, seed), weights(widths, seed + 50)
        best = max(
            product(a, {"w0": b["w0"][list(p)], "b0": b["b0"][list(p)], "w1": b["w1"][:, list(p)]}, spec)
            for p in itertools.permutations(range(5))
        )
        assert match(a, [b], spec).history[-1] == pytest.approx(best, rel=1e-9)


def test_fixed_point_agrees_with_numpy_coordinate_descent():
    """Written from the paper's cost sum_i W_i^A P_{i-1} (W_i^B)' + ...: no single layer can be improved further."""
    widths = [4, 7, 6, 3]
    a, b = weights(widths, 0), weights(widths, 9)
    found = match(a, [b], chain(widths), seed=3)
    p = [found.permutations[0].arrangements[f"h{k}"].outer.numpy() for k in range(2)]
    na, nb = ({k: v.double().numpy() for k, v in m.items()} for m in (a, b))
    gain0 = na["w0"] @ nb["w0"].T + np.outer(na["b0"], nb["b0"]) + na["w1"].T @ nb["w1"][p[1]]
    gain1 = na["w1"] @ nb["w1"][:, p[0]].T + np.outer(na["b1"], nb["b1"]) + na["w2"].T @ nb["w2"]
    for gain, own in ((gain0, p[0]), (gain1, p[1])):
        rows, columns = linear_sum_assignment(gain, maximize=True)
        assert gain[np.arange(len(own)), own].sum() == pytest.approx(gain[rows, columns].sum(), rel=1e-9)
    total = gain0[np.arange(7), p[0]].sum() + (na["w2"] * nb["w2"][:, p[1]]).sum() + na["b1"] @ nb["b1"][p[1]]
    assert found.history[-1] == pytest.approx(total, rel=1e-5)


def test_heads_in_any_inner_order_are_found_by_enumeration():
    """Two heads of two units, v rows with o columns: all 2! (2!)^2 arrangements are tried."""
    group = Group("h", 2, (Site("v", 0, levels=("vo",)), Site("o", 1, levels=("vo",))), {"vo": 2})
    g = torch.Generator().manual_seed(0)
    a, b = ({"v": torch.randn(4, 3, generator=g), "o": torch.randn(3, 4, generator=g)} for _ in range(2))
    best = -np.inf
    for heads in itertools.permutations(range(2)):
        for inner in itertools.product(itertools.permutations(range(2)), repeat=2):
            index = [2 * h + j for h, places in zip(heads, inner, strict=True) for j in places]
            best = max(best, float((a["v"] * b["v"][index]).sum() + (a["o"] * b["o"][:, index]).sum()))
    assert match(a, [b], Spec((group,))).history[-1] == pytest.approx(best, rel=1e-6)


def test_two_levels_in_one_site_are_recovered():
    sites = (Site("q", 0, levels=("query", "qk")), Site("k", 0, levels=("qk",)), Site("v", 0, levels=("vo",)),
             Site("o", 1, levels=("query", "vo")))  # fmt: skip
    spec = Spec((Group("h", 3, sites, {"query": 2, "qk": 4, "vo": 4}),))
    g = torch.Generator().manual_seed(0)
    a = {"q": torch.randn(24, 9, generator=g), "k": torch.randn(12, 9, generator=g),
         "v": torch.randn(12, 9, generator=g), "o": torch.randn(9, 24, generator=g)}  # fmt: skip
    shuffled = Permutation.random(spec, 1).apply(a)
    back = match(a, [shuffled], spec).permutations[0].apply(shuffled)
    assert all(torch.equal(back[n], a[n]) for n in a)


def test_inverse_and_composition_undo_each_other():
    spec = Spec((Group("h", 3, (Site("q", 0, levels=("a", "b"), width=2), Site("k", 0, 3, ("b",))), {"a": 2, "b": 3}),))
    tensors = {"q": torch.arange(36.0), "k": torch.arange(14.0)}
    first, second = Permutation.random(spec, 1), Permutation.random(spec, 2)
    back = first.inverse().apply(first.apply(tensors))
    assert all(torch.equal(back[n], tensors[n]) for n in tensors)
    both = Permutation(spec, {"h": first.arrangements["h"].then(second.arrangements["h"])})
    twice = second.apply(first.apply(tensors))
    assert all(torch.equal(both.apply(tensors)[n], twice[n]) for n in tensors)
    assert torch.equal(twice["k"][:3], tensors["k"][:3])  # outside the stretch
    assert torch.equal(twice["k"][12:], tensors["k"][12:])


@pytest.mark.parametrize("to", ["first", "mean"])
@pytest.mark.parametrize("experts", [1, 2, 5])
def test_history_never_falls_and_results_repeat(to, experts):
    widths = [5, 12, 10, 8, 3]
    spec = chain(widths)
    reference, others = weights(widths, 0), [weights(widths, k + 1) for k in range(experts)]
    found = match(reference, others, spec, to=to)
    assert list(found.history) == sorted(found.history)
    assert all(after > before for before, after in found.similarity)
    again = match(reference, others, Spec(tuple(reversed(spec.groups))), to=to)
    assert again.history == pytest.approx(found.history, rel=1e-12)
    for a, b in zip(found.permutations, again.permutations, strict=True):
        assert all(torch.equal(a.arrangements[n].outer, b.arrangements[n].outer) for n in a.arrangements)


@pytest.mark.parametrize("to", ["first", "mean"])
def test_order_of_experts_does_not_matter(to):
    widths = [5, 12, 10, 3]
    reference, others = weights(widths, 0), [weights(widths, k + 1) for k in range(3)]
    forward = match(reference, others, chain(widths), to=to).permutations
    backward = match(reference, others[::-1], chain(widths), to=to).permutations[::-1]
    for a, b in zip(forward, backward, strict=True):
        assert all(torch.equal(a.arrangements[n].outer, b.arrangements[n].outer) for n in a.arrangements)


def test_mean_raises_the_pairwise_objective_over_first():
    widths = [4, 16, 3]
    spec = chain(widths)
    reference, others = weights(widths, 0), [weights(widths, k + 1) for k in range(4)]

    def pairwise(to):
        found = match(reference, others, spec, to=to)
        models = [reference, *(p.apply(o) for p, o in zip(found.permutations, others, strict=True))]
        return sum(product(a, b, spec) for a, b in itertools.combinations(models, 2)), found.history[-1]

    first, _ = pairwise("first")
    mean, stated = pairwise("mean")
    assert mean > first * 1.05
    assert mean == pytest.approx(stated, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_storage_is_kept_bit_by_bit_near_the_limit_of_a_format(dtype):
    widths = [5, 9, 3]
    spec = chain(widths)
    a = {n: (t * 1e4).to(dtype) for n, t in weights(widths, 0).items()}
    shuffled = Permutation.random(spec, 1).apply(a)
    found = match(a, [shuffled], spec)
    back = found.permutations[0].apply(shuffled)
    assert np.isfinite(found.history).all()
    assert all(torch.equal(back[n], a[n]) and back[n].dtype == dtype for n in a)


def test_equal_and_zero_models_stay_as_they_are():
    widths = [5, 9, 7, 3]
    spec, a = chain(widths), weights(widths, 0)
    zero = {n: torch.zeros_like(t) for n, t in a.items()}
    for reference, expert in ((a, a), (a, zero), (zero, a), (zero, zero)):
        found = match(reference, [expert], spec)
        assert found.permutations[0].moved == 0
        assert found.passes == 1
        assert np.isfinite(found.similarity).all()


def test_a_group_on_both_axes_of_a_matrix_never_loses():
    """The assignment only approximates this quadratic problem; steps that lose are not taken."""
    spec = Spec((Group("stream", 12, (Site("e", 1), Site("w", 0), Site("w", 1))),))
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        a, b = ({"e": torch.randn(20, 12, generator=g), "w": torch.randn(12, 12, generator=g)} for _ in range(2))
        history = match(a, [b], spec).history
        assert list(history) == sorted(history)
        shuffled = Permutation.random(spec, seed).apply(a)
        back = match(a, [shuffled], spec).permutations[0].apply(shuffled)
        assert torch.equal(back["w"], a["w"])


def test_unknown_target_is_refused():
    with pytest.raises(MergeError, match="mean"):
        match({}, [], chain([1, 2, 1]), to="maen")
