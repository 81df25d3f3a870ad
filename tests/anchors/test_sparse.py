"""Elementwise merges against examples done by hand, and against their formulas written out again in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.anchors import merge
from bmm.anchors.breadcrumbs import crumbs
from bmm.anchors.della import drop_probabilities, magprune
from bmm.anchors.selection import order_statistics
from bmm.errors import MergeError

from .models import family, float32_lists
from .test_kernels import assert_close, from_zero, random_taus, tensor


def models_of(tasks, seed=0):
    """Two-tensor models of different sizes, and the base of zeros they stand on."""
    models = [{"a": random_taus((30, 7), seed + t), "b": random_taus((60,), seed + 9 + t, 0.2)} for t in range(tasks)]
    return {k: torch.zeros_like(v) for k, v in models[0].items()}, models


def flat(models):
    """(T, D) float64, tensors in order."""
    return np.stack([np.concatenate([v.numpy().reshape(-1) for v in m.values()]) for m in models]).astype(np.float64)


# -- Breadcrumbs ------------------------------------------------------------------------------------------------------


def test_breadcrumbs_by_hand():
    a = [1, -2, 3, -4, 5, -6, 7, -8, 9, 10]
    assert from_zero("breadcrumbs", a, beta=0.3, gamma=0.9, scale=1).tolist() == [0, 0, 0, -4, 5, -6, 7, -8, 9, 0]
    both = from_zero("breadcrumbs", a, a[::-1], beta=0.3, gamma=0.9, scale=1)
    assert both.tolist() == [0, 9, -8, 3, -1, -1, 3, -8, 9, 0]
    elected = from_zero("breadcrumbs", a, a[::-1], beta=0.3, gamma=0.9, scale=1, fuse="agree_mean")
    assert elected.tolist() == [0, 9, -8, 7, -6, -6, 7, -8, 9, 0]
    assert from_zero("breadcrumbs", [2], [-3], scale=1).tolist() == [-1]  # no tensor is emptied


@pytest.mark.parametrize(("beta", "gamma"), [(0.85, 0.993), (0.0, 0.95), (0.5, 1.0), (0.9, 0.91)])
def test_breadcrumbs_matches_its_formula(beta, gamma):
    base, models = models_of(4)
    merged = merge("breadcrumbs", base, models, beta=beta, gamma=gamma)
    for name, w0 in base.items():
        total = np.zeros(w0.numel())
        for model in models:
            tau = model[name].numpy().astype(np.float64).reshape(-1)
            order = np.argsort(np.abs(tau))
            kept = order[int(beta * len(tau) + 1e-6) : int(np.ceil(gamma * len(tau) - 1e-6))]
            total[kept] += tau[kept]
        assert_close(merged[name].reshape(-1), 0.3 * total)


def test_breadcrumbs_keeps_equal_magnitudes_together():
    taus = tensor([1, -1, 1, 1, 2, 2])
    assert crumbs(taus, 0.5, 1.0).tolist() == taus.tolist()
    assert crumbs(taus, 0.0, 0.9).tolist() == taus.tolist()
    assert crumbs(tensor([1, 2, 3, 4]), 0.5, 0.75).tolist() == [[0, 0, 3, 0]]


def test_breadcrumbs_refuses_an_empty_window():
    with pytest.raises(MergeError, match="leave no entry"):
        from_zero("breadcrumbs", [1, 2], beta=0.95, gamma=0.9)


# -- DELLA ------------------------------------------------------------------------------------------------------------


def test_drop_probabilities_by_hand():
    rows = tensor([1, -5, 3], [0.5, 0.5, -9])
    assert_close(drop_probabilities(rows, 0.5, 0.2), [[0.6, 0.4, 0.5], [0.5, 0.6, 0.4]])
    assert_close(drop_probabilities(rows, 0.9, 0.5), [[1.0, 0.8, 0.9], [0.9, 1.0, 0.8]])  # narrowed
    assert drop_probabilities(rows, 0.0, 0.5).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert drop_probabilities(tensor([4], [5]), 0.3, 0.2).tolist() == [[pytest.approx(0.3)]] * 2


def test_magprune_keeps_the_share_it_says_and_rescales():
    tau = random_taus((50, 400))
    pruned = magprune(tau, "w", 0.7, 0.4, "row", 0)
    p, kept = drop_probabilities(tau, 0.7, 0.4), pruned != 0
    assert_close(pruned[kept], (tau / (1 - p))[kept], 1e-6)
    assert abs(float(kept.float().mean()) - 0.3) < 0.01
    sizes = tau.abs().argsort(1)
    quarter = sizes.shape[1] // 4
    for part, share in ((sizes[:, :quarter], 0.15), (sizes[:, -quarter:], 0.45)):  # smallest and largest quarters
        assert abs(float(kept.gather(1, part).float().mean()) - share) < 0.02


def test_magprune_is_unbiased():
    tau = random_taus((3, 5))
    mean = torch.stack([magprune(tau, "w", 0.5, 0.6, "row", seed) for seed in range(4000)]).mean(0)
    assert (mean - tau).abs().max() < 5 * tau.abs().max() * (4 / 4000) ** 0.5


def test_ranking_in_rows_or_in_the_whole_tensor():
    tau = torch.cat([torch.full((1, 300), 0.001), torch.full((1, 300), 1.0)]) * (1 + 0.1 * torch.rand(2, 300))
    rows, whole = (magprune(tau, "w", 0.5, 1.0, ranking, 0) != 0 for ranking in ("row", "tensor"))
    assert abs(float(rows[0].float().mean()) - 0.5) < 0.1
    assert float(whole[0].float().mean()) < 0.35 < 0.65 < float(whole[1].float().mean())
    vector = tau.reshape(-1)
    assert torch.equal(magprune(vector, "w", 0.5, 1.0, "row", 0), magprune(vector, "w", 0.5, 1.0, "tensor", 0))


@pytest.mark.parametrize("fuse", ["sum", "agree_sum", "agree_mean"])
def test_della_fuses_what_agrees(fuse):
    base, models = models_of(5)
    merged = merge("della", base, models, fuse=fuse, drop=0.6, epsilon=0.3, seed=4, scale=1)
    for name in base:
        pruned = np.stack([magprune(m[name], name, 0.6, 0.3, "row", 4).double().numpy() for m in models])
        agree = np.ones_like(pruned, bool) if fuse == "sum" else np.sign(pruned) == np.sign(pruned.sum(0))
        total = np.where(agree, pruned, 0).sum(0)
        if fuse == "agree_mean":
            total = total / np.maximum((agree & (pruned != 0)).sum(0), 1)
        assert_close(merged[name], total)


def test_cancelling_entries_stay_at_the_base():
    assert from_zero("della", [1, 2], [-1, 1], drop=0.0, scale=1).tolist() == [0, 1.5]


# -- MagMax, EMR ------------------------------------------------------------------------------------------------------


def test_magmax_by_hand():
    taus = [[1, -2, 3, 0, 1], [-4, 1, -3, 0, 1], [2, -1, 3, 0, -1]]
    assert from_zero("magmax", *taus, scale=1).tolist() == [-4, -2, 0, 0, 0]
    assert from_zero("magmax", *taus[::-1], scale=1).tolist() == [-4, -2, 0, 0, 0]
    assert from_zero("magmax", [1, 2], [-2, 1], weights=[3, -1], scale=1).tolist() == [3, 6]


def test_emr_by_hand():
    taus = [[1, -2, 3, 0, 1], [-4, 1, -3, 0, 1], [2, -1, 3, 0, -2]]
    assert from_zero("emr", *taus).tolist() == [-4, -2, 3, 0, 0]
    assert from_zero("emr", [1, 2], [-2, 1], weights=[3, -1]).tolist() == [3, 6]


def test_magmax_and_emr_match_their_formulas():
    base, models = models_of(6)
    magmax, emr = merge("magmax", base, models), merge("emr", base, models)
    for name in base:
        taus = np.stack([m[name].double().numpy() for m in models])
        largest = np.take_along_axis(taus, np.abs(taus).argmax(0)[None], 0)[0]
        assert_close(magmax[name], 0.5 * largest)
        sign = np.sign(taus.sum(0))
        assert_close(emr[name], sign * np.where(np.sign(taus) == sign, np.abs(taus), 0).max(0))


# -- Consensus TA -----------------------------------------------------------------------------------------------------


def test_consensus_by_hand():
    a, b, c = [4, 1, 1, 0.1], [4, 0, -1, 0.1], [4, 0, 0, -9]
    # of coordinate 3 only c sees its own update in the sum: 0.1 < 0.5 * 8.9 for the other two
    assert from_zero("consensus_ta", a, b, c, mask_strength=0.5, scale=1).tolist()[0] == 12
    merged = from_zero("consensus_ta", a, b, c, mask_strength=0.5, scale=1)
    assert_close(merged, [12, 0, 0, 0])
    assert_close(from_zero("consensus_ta", a, b, c, mask_strength=0.5, agree=1, scale=1), [12, 1, 0, -8.8])
    assert_close(from_zero("consensus_ta", a, b, c, mask_strength=0.5, agree=0, scale=1), [12, 1, 0, -8.8])
    assert_close(from_zero("consensus_ta", a, b, c, mask_strength=0.4, agree=64, scale=1), [12, 0, 0, 0])


@pytest.mark.parametrize(("strength", "agree"), [(0.0, 2), (0.4, 2), (0.6, 3), (1.0, 1)])
def test_consensus_matches_its_formula(strength, agree):
    base, models = models_of(5)
    merged = merge("consensus_ta", base, models, mask_strength=strength, agree=agree)
    for name in base:
        taus = np.stack([m[name].double().numpy() for m in models])
        total = taus.sum(0)
        used = sum((np.abs(tau) >= strength * np.abs(total - tau)).astype(int) for tau in taus)
        assert_close(merged[name], 0.3 * np.where(used >= agree, total, 0))
    assert any((merged[k] == 0).any() for k in base) == (strength > 0)


# -- PCB --------------------------------------------------------------------------------------------------------------


def min_max(x):
    return (x - x.min()) / (x.max() - x.min())


def reference_pcb(taus, balance, ratio):
    """(T, D) -> (D,)."""
    tasks, size = taus.shape
    k = max(1, round(ratio * size))
    weights, values = [], []
    for tau in taus:
        if balance == "code":
            magnitudes = np.sort(np.abs(tau))
            tail = int(1e-4 * size)
            clamped = np.clip(np.abs(tau), magnitudes[tail], magnitudes[size - 1 - tail])
            scores = np.exp(tasks * min_max(clamped) ** 2) * np.tanh(tau * taus.sum(0))
            cut = np.sort(scores)[-k]
            weights.append(np.maximum(scores - cut, 0) / (scores.max() - cut))
            values.append(np.sign(tau) * clamped)
        else:
            intra = np.exp(tasks * min_max(tau * tau))
            inter = [np.exp(min_max(tau * other)) for other in taus]
            scores = intra / intra.sum() * sum(e / e.sum() for e in inter)
            weights.append(np.where(scores >= np.sort(scores)[-k], scores, 0))
            values.append(tau)
    mass = np.sum(weights, 0)
    return np.sum(np.multiply(weights, values), 0) / np.where(mass > 0, mass, 1)


@pytest.mark.parametrize("balance", ["code", "paper"])
@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.5, 1.0])
def test_pcb_matches_its_formula_over_the_whole_model(balance, ratio):
    base, models = models_of(4)
    merged = merge("pcb", base, models, balance=balance, ratio=ratio)
    assert_close(flat([merged])[0], reference_pcb(flat(models), balance, ratio))


def test_pcb_clamps_the_tails_of_large_models():
    base = {"w": torch.zeros(30_000)}
    models = [{"w": random_taus((30_000,), t)} for t in range(2)]
    models[0]["w"][5] = 40.0  # three such entries of each end are tails
    merged = merge("pcb", base, models)
    assert float(merged["w"].abs().max()) < 0.3
    assert_close(merged["w"], reference_pcb(flat(models), "code", 0.1))


def test_pcb_by_hand():
    # one task: scores rise with |tau|; half of the entries stay, the lowest of them with weight 0
    assert from_zero("pcb", [1, -2, 3, 4], ratio=0.5).tolist() == [0, 0, 0, 4]
    assert_close(from_zero("pcb", [1, -2, 3, 4], ratio=0.5, balance="paper"), [0, 0, 3, 4])
    # two tasks, the second still: it takes no part
    for balance in ("code", "paper"):
        assert_close(from_zero("pcb", [1, -2, 3, 4], [0, 0, 0, 0], ratio=0.75, balance=balance)[2:], [3, 4])


@settings(deadline=None, max_examples=60)
@given(
    values=float32_lists(),
    split=st.integers(0, 40),
    rank=st.integers(1, 40),
)
def test_order_statistics_are_exact(values, split, rank):
    row = torch.tensor(values, dtype=torch.float32)
    rank = min(rank, len(row))
    rows = [[part, -part] for part in (row[:split], row[split:])]
    found = order_statistics(rows, lambda n: (rank, n))
    descending = row.sort(descending=True).values
    assert found[0].tolist() == [descending[rank - 1], descending[-1]]
    assert found[1].tolist() == [-descending[len(row) - rank], -descending[0]]


# -- hostile input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["breadcrumbs", "della", "magmax", "consensus_ta", "pcb", "emr"])
def test_weights_multiply_the_task_vectors(name):
    base, models = models_of(3)
    weights = [2.0, -0.5, 1.25]
    scaled = [{k: a * v for k, v in model.items()} for a, model in zip(weights, models, strict=True)]
    knobs = {"drop": 0.0, "fuse": "sum"} if name == "della" else {}
    one, two = merge(name, base, models, weights=weights, **knobs), merge(name, base, scaled, **knobs)
    assert all(torch.equal(one[key], two[key]) for key in base)


@pytest.mark.parametrize("balance", ["code", "paper"])
def test_pcb_of_many_tasks_and_tiny_entries(balance):
    base, models = family(33, size=1e-12)
    merged = merge("pcb", {k: torch.zeros_like(v) for k, v in base.items()}, models, balance=balance)
    assert all(torch.isfinite(v).all() for v in merged.values())
    assert any(v.is_floating_point() and (v != 0).any() for v in merged.values())


def test_kernels_know_nothing_but_their_tensor():
    """No scan: the merge of a tensor alone is its merge in a model."""
    base, models = family(3)
    for name in ("breadcrumbs", "della", "magmax", "consensus_ta", "emr"):
        whole = merge(name, base, models)["wide.weight"]
        alone = merge(name, *({"wide.weight": m["wide.weight"]} for m in (base,)),
                      [{"wide.weight": m["wide.weight"]} for m in models])["wide.weight"]  # fmt: skip
        assert torch.equal(whole, alone)
