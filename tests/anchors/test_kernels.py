"""Every kernel against examples done by hand, and against its formula written out again in float64."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.anchors import Context, get, merge
from bmm.anchors.anchor import Whole
from bmm.anchors.dare import drop_and_rescale
from bmm.anchors.iso import iso_c, iso_cts
from bmm.anchors.regmean import regmean
from bmm.anchors.ties import global_cuts, scan_ties, ties
from bmm.anchors.tsv import tsv, whiten
from bmm.anchors.wudi import objective, wudi, wudi_exact
from bmm.errors import MergeError

from .models import float32_lists

SHAPES = [(2, 6, 6), (3, 7, 12), (4, 12, 7), (1, 5, 8)]


def at(taus, grams=None, state=None, weights=None):
    """The context of a lone tensor, equal task weights unless given."""
    return Context(
        "w", taus[0], torch.ones(len(taus)) if weights is None else torch.tensor(weights), grams, state=state
    )


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def random_taus(shape, seed=0, size=0.05):
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def from_zero(name, *taus, **options):
    """The merged task vector of one-tensor models around a base of zeros."""
    experts = [{"w": torch.as_tensor(tau, dtype=torch.float32)} for tau in taus]
    return merge(name, {"w": torch.zeros_like(experts[0]["w"])}, experts, **options)["w"]


def assert_close(a, b, tolerance=1e-5):
    """Within ``tolerance`` of the largest entry."""
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-30)


# -- average, task arithmetic ---------------------------------------------------------------------------------------


def test_average_and_task_arithmetic_by_hand():
    base = {"w": tensor(1, 1)}
    experts = [{"w": tensor(2, 5)}, {"w": tensor(4, -1)}]
    assert merge("average", base, experts)["w"].tolist() == [3, 2]
    assert merge("task_arithmetic", base, experts, scale=0.5)["w"].tolist() == [3, 2]
    assert merge("task_arithmetic", base, experts, scale=1)["w"].tolist() == [5, 3]


# -- TIES -----------------------------------------------------------------------------------------------------------


def reference_ties(models, density, reduce):
    """``models``: one dict of arrays a task. Sort whole task vectors, then trim, elect and merge flat ones."""
    names = list(models[0])
    flat = np.stack([np.concatenate([m[n].reshape(-1) for n in names]) for m in models]).astype(np.float64)
    k = max(1, round(density * flat.shape[1]))
    for row in flat:
        row[np.abs(row) < np.sort(np.abs(row))[-k]] = 0
    sign = np.sign(flat.sum(0))
    sign[sign == 0] = np.sign(sign.sum())
    agree = (np.sign(flat) == sign) & (flat != 0)
    total = np.where(agree, flat, 0).sum(0)
    merged = total / np.maximum(agree.sum(0), 1) if reduce == "mean" else total
    ends = np.cumsum([models[0][n].size for n in names])
    return {n: part.reshape(models[0][n].shape) for n, part in zip(names, np.split(merged, ends[:-1]), strict=True)}


def test_ties_by_hand():
    a, b = [4, -1, 2, 0], [-3, -2, 1, 0.5]
    assert from_zero("ties", a, b, density=0.5).tolist() == [4, -2, 2, 0]
    assert from_zero("ties", a, b, density=1.0).tolist() == [4, -1.5, 1.5, 0.5]
    assert from_zero("ties", a, b, density=1.0, reduce="sum", scale=0.5).tolist() == [2, -1.5, 1.5, 0.25]


def test_ties_trims_over_the_whole_model():
    base = {"large": torch.zeros(4), "small": torch.zeros(4)}
    expert = {"large": tensor(5, -6, 7, 8), "small": tensor(1, 2, 3, 4)}
    merged = merge("ties", base, [expert], density=0.5)
    assert merged["large"].tolist() == [5, -6, 7, 8]
    assert merged["small"].tolist() == [0, 0, 0, 0]


def test_cancelling_entries_take_the_majority_sign_of_the_model():
    assert from_zero("ties", [1, 2, 0, 0], [-1, 1, 3, -1], density=1.0).tolist() == [1, 1.5, 3, -1]
    assert from_zero("ties", [1, -2, 0], [-1, -1, -3], density=1.0).tolist() == [-1, -1.5, -3]
    assert from_zero("ties", [1, 2], [-1, -2], density=1.0).tolist() == [0, 0]  # a draw


def test_entries_equal_to_the_cut_all_stay():
    assert from_zero("ties", [1, -1, 1, 0.5], density=0.25).tolist() == [1, -1, 1, 0]
    assert from_zero("ties", [0, 0, 0, 2], density=0.75).tolist() == [0, 0, 0, 2]


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_ties_matches_its_formula(density, reduce):
    models = [{"a": random_taus((30, 7), t), "b": random_taus((50,), 9 + t, 0.2)} for t in range(5)]
    base = {k: torch.zeros_like(v) for k, v in models[0].items()}
    merged = merge("ties", base, models, density=density, reduce=reduce)
    reference = reference_ties([{k: v.numpy() for k, v in m.items()} for m in models], density, reduce)
    for name in base:
        assert_close(merged[name], reference[name])


@settings(deadline=None, max_examples=60)
@given(
    values=float32_lists(),
    split=st.integers(0, 40),
    density=st.floats(0.001, 1.0),
)
def test_cuts_are_the_exact_order_statistic(values, split, density):
    flat = torch.tensor(values, dtype=torch.float32)
    stream = [(str(n), part[None]) for n, part in enumerate((flat[:split], flat[split:]))]
    k = max(1, round(density * len(flat)))
    assert global_cuts(stream, density) == (float(flat.abs().sort(descending=True).values[k - 1]),)


def test_signs_are_elected_alike_in_any_order():
    """1e8 + 1 - 1e8 - 0.5 is positive; adding in float32 gives either sign."""
    taus = tensor([1e8], [1.0], [-1e8], [-0.5])
    for order in ([0, 1, 2, 3], [0, 2, 1, 3], [3, 1, 0, 2]):
        state = scan_ties([("w", taus[order])], {"density": 1.0}, Whole(torch.ones(len(taus)), {}, ()))
        assert ties(taus[order], at(taus, state=state), density=1.0, reduce="sum") > 0


# -- DARE -----------------------------------------------------------------------------------------------------------


def test_dare_keeps_the_share_it_says_and_rescales():
    taus = random_taus((2, 100, 100))
    dropped = drop_and_rescale(taus, "w", 0.75, 0)
    kept = dropped != 0
    assert_close(dropped[kept], 4 * taus[kept], 1e-6)
    assert abs(float(kept.float().mean()) - 0.25) < 5 * (0.25 * 0.75 / taus.numel()) ** 0.5
    both = (kept[0] & kept[1]).float().mean()  # experts draw independently
    assert abs(float(both) - 0.0625) < 5 * (0.0625 * 0.9375 / taus[0].numel()) ** 0.5


def test_dare_is_unbiased():
    tau = random_taus((1, 20))
    mean = torch.stack([drop_and_rescale(tau, "w", 0.5, seed) for seed in range(2000)]).mean(0)
    assert ((mean - tau).abs() <= 5 * tau.abs() / 2000**0.5).all()


def test_dare_draws_go_by_seed_name_and_content():
    tau = random_taus((1, 200))
    reference = drop_and_rescale(tau, "w", 0.5, 0)
    assert torch.equal(drop_and_rescale(tau.clone(), "w", 0.5, 0), reference)
    assert torch.equal(drop_and_rescale(torch.cat([2 * tau, tau]), "w", 0.5, 0)[1:], reference)
    for other in (drop_and_rescale(tau, "w", 0.5, 1), drop_and_rescale(tau, "v", 0.5, 0)):
        assert not torch.equal(other != 0, reference != 0)
    assert not torch.equal(drop_and_rescale(2 * tau, "w", 0.5, 0) != 0, reference != 0)


def test_dare_draws_entries_independently_and_exactly_as_often_as_asked():
    kept = drop_and_rescale(torch.arange(1.0, 1 + (1 << 21))[None], "w", 0.7, 0)[0] != 0  # no two pieces are alike
    for lag in (1, 2, 3, 4):  # four entries share 64 random bits
        both = (kept[lag:] & kept[:-lag]).float().mean()
        assert abs(float(both) - 0.09) < 5 * (0.09 * 0.91 / len(kept)) ** 0.5
    assert abs(float(kept.float().mean()) - 0.3) < 5 * (0.3 * 0.7 / len(kept)) ** 0.5
    # Probabilities finer than the 2^16 levels of a draw.
    fine = torch.cat([drop_and_rescale(torch.ones(1, 1 << 14), "w", 2**-16 / 3, seed) for seed in range(2000)])
    expected = fine.numel() * 2**-16 / 3
    assert abs(int((fine == 0).sum()) - expected) < 5 * expected**0.5


def test_dare_tells_large_contents_apart():
    """Content is folded to sums before it is hashed: what moves within a tensor changes the draw all the same."""
    tau = random_taus((64, 128))
    masks = [
        tau,
        tau.flip(0),
        tau.flip(1),
        tau.roll(1, 0),
        tau.index_put((torch.tensor(7), torch.tensor(9)), tau[0, 0]),
    ]
    masks = [drop_and_rescale(m[None], "w", 0.5, 0)[0] != 0 for m in masks]
    for a, b in itertools.combinations(masks, 2):
        assert abs(float((a == b).float().mean()) - 0.5) < 5 * (0.25 / tau.numel()) ** 0.5


def test_dare_merges_what_it_left():
    base = {"a": torch.zeros(40, 5), "b": torch.zeros(60)}
    models = [{"a": random_taus((40, 5), t), "b": random_taus((60,), 7 + t)} for t in range(3)]
    left = [{k: drop_and_rescale(v[None], k, 0.3, 5)[0] for k, v in m.items()} for m in models]
    summed = merge("dare_ta", base, models, drop=0.3, seed=5, scale=0.7)
    for name in base:
        assert_close(summed[name], 0.7 * sum(m[name].double() for m in left))
    reference = reference_ties([{k: v.numpy() for k, v in m.items()} for m in left], 0.4, "mean")
    elected = merge("dare_ties", base, models, drop=0.3, seed=5, density=0.4)
    for name in base:
        assert_close(elected[name], reference[name])


def test_dare_without_dropping_is_the_plain_method():
    taus = [random_taus((6, 5), t) for t in range(3)]
    assert torch.equal(from_zero("dare_ta", *taus, drop=0.0), from_zero("task_arithmetic", *taus))
    assert torch.equal(from_zero("dare_ties", *taus, drop=0.0), from_zero("ties", *taus))


# -- TSV, Iso -------------------------------------------------------------------------------------------------------


def polar(matrix):
    p, _, qh = np.linalg.svd(matrix, full_matrices=False)
    return p @ qh


def reference_tsv(taus):
    rank = max(1, min(taus.shape[1:]) // len(taus))
    parts = [np.linalg.svd(tau, full_matrices=False) for tau in taus]
    u = np.concatenate([u[:, :rank] for u, _, _ in parts], 1)
    s = np.concatenate([s[:rank] for _, s, _ in parts])
    v = np.concatenate([vh[:rank].T for _, _, vh in parts], 1)
    return polar(u) @ np.diag(s) @ polar(v).T


def reference_iso_cts(taus, share):
    slots = min(taus.shape[1:])
    own = min(round((1 - share) * slots / len(taus)), slots // len(taus))
    common = slots - own * len(taus)
    u, s, vh = np.linalg.svd(taus.sum(0), full_matrices=False)
    us, ss, vs = [u[:, :common]], [s[:common]], [vh[:common].T]
    for tau in taus:
        uc = us[0]
        u, s, vh = np.linalg.svd(tau - uc @ uc.T @ tau, full_matrices=False)
        us, ss, vs = [*us, u[:, :own]], [*ss, s[:own]], [*vs, vh[:own].T]
    return np.concatenate(ss).mean() * polar(np.concatenate(us, 1)) @ polar(np.concatenate(vs, 1)).T


def test_tsv_by_hand():
    """Orthogonal leading directions stay as they are; what is beyond each task's rank is left out."""
    assert_close(from_zero("tsv", [[3, 0], [0, 1]], [[0, 0], [0, 2]]), [[3, 0], [0, 2]])
    assert_close(from_zero("tsv", [[3, 0], [0, 1]]), [[3, 0], [0, 1]])


@pytest.mark.parametrize("shape", [*SHAPES, (9, 4, 6), (33, 5, 3), (5, 1, 8), (4, 8, 1)])
def test_tsv_matches_its_formula(shape):
    taus = random_taus(shape)
    assert_close(tsv(taus, at(taus)), reference_tsv(taus.double().numpy()), 2e-5)


def test_whitening_gives_orthonormal_columns_or_rows():
    tall, wide = random_taus((9, 4)), random_taus((4, 9))
    assert_close(whiten(tall, tall.dtype).mT @ whiten(tall, tall.dtype), np.eye(4))
    assert_close(whiten(wide, wide.dtype) @ whiten(wide, wide.dtype).mT, np.eye(4))
    twice = torch.cat([tall[:, :1], tall[:, :1]], 1)  # dependent: one direction shared by two columns
    assert_close(whiten(twice, twice.dtype), torch.cat([tall[:, :1]] * 2, 1) / (2**0.5 * tall[:, :1].norm()))


@pytest.mark.parametrize("kernel", [tsv, iso_c, lambda taus, context: iso_cts(taus, context, common_share=0.5)])
def test_low_rank_task_vectors_stay_within_their_spans(kernel):
    """LoRA experts: the merged task vector has no rank that the experts do not have."""
    left, right = random_taus((3, 20, 2), 1, 1.0), random_taus((3, 2, 16), 2, 1.0)
    d = kernel(left @ right, at(left @ right))
    assert int(torch.linalg.matrix_rank(d, rtol=1e-4)) <= 6
    columns = torch.linalg.qr(torch.cat(list(left), 1)).Q
    assert (d - columns @ (columns.mT @ d)).norm() < 1e-4 * d.norm()


def test_iso_c_by_hand():
    assert_close(from_zero("iso_c", [[3, 0], [0, 1]], [[1, 0], [0, 1]]), [[3, 0], [0, 3]])


def test_iso_c_keeps_the_nuclear_norm_of_a_low_rank_sum():
    taus = random_taus((3, 20, 2), 1, 1.0) @ random_taus((3, 2, 16), 2, 1.0)
    d = iso_c(taus, at(taus))
    assert float(torch.linalg.matrix_norm(d, "nuc")) == pytest.approx(
        float(torch.linalg.matrix_norm(taus.sum(0), "nuc")), rel=1e-5
    )


@pytest.mark.parametrize("shape", [*SHAPES, (5, 1, 8)])
def test_iso_c_matches_its_formula(shape):
    taus = random_taus(shape)
    u, s, vh = np.linalg.svd(taus.double().numpy().sum(0), full_matrices=False)
    assert_close(iso_c(taus, at(taus)), s.mean() * u @ vh, 2e-5)


def test_iso_cts_by_hand():
    """Four slots, half of them common (5 and 4 of the sum), one each for the tasks (2 and 1): mean 3."""
    first, second = np.diag([5.0, 0, 2, 0]), np.diag([0.0, 4, 0, 1])
    assert_close(from_zero("iso_cts", first, second, common_share=0.5), 3 * np.eye(4))


@pytest.mark.parametrize("shape", [(2, 10, 10), (3, 12, 20), (4, 20, 12), (7, 10, 12)])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
def test_iso_cts_matches_its_formula(shape, share):
    taus = random_taus(shape)
    reference = reference_iso_cts(taus.double().numpy(), share)
    assert_close(iso_cts(taus, at(taus), common_share=share), reference, 5e-5)


def test_iso_cts_is_iso_c_without_own_slots_or_with_one_expert():
    taus = random_taus((3, 8, 9))
    assert_close(iso_cts(taus, at(taus), common_share=1.0), iso_c(taus, at(taus)))
    assert_close(iso_cts(taus[:1], at(taus[:1]), common_share=0.5), iso_c(taus[:1], at(taus[:1])))


# -- WUDI -----------------------------------------------------------------------------------------------------------


def interference(d, taus):
    return sum(((d - tau) @ tau.mT).square().sum() / tau.square().sum() for tau in taus)


def test_wudi_by_hand():
    """(d - 1)^2 + (d - 2)^2 from d = 3: Adam's first step is its rate, the minimum is at 1.5."""
    assert from_zero("wudi", [[1]], [[2]], steps=0).item() == 3
    assert from_zero("wudi", [[1]], [[2]], steps=1, rate=0.01).item() == pytest.approx(2.99, abs=1e-6)
    assert from_zero("wudi_exact", [[1]], [[2]], ridge=0.0).item() == pytest.approx(1.5, abs=1e-6)
    # ridge 1 with largest eigenvalue 2: (d - 1)^2 + (d - 2)^2 + 2 (d - 3)^2 has its minimum at 2.25
    assert from_zero("wudi_exact", [[1]], [[2]], ridge=1.0).item() == pytest.approx(2.25, abs=1e-6)
    assert from_zero("wudi_exact", [[1]], [[2]], ridge=1.0, towards="mean").item() == pytest.approx(1.5, abs=1e-6)
    # task vectors that read different inputs do not interfere
    assert_close(from_zero("wudi_exact", [[1, 0]], [[0, 2]]), [[1, 2]])


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wudi_is_adam_on_the_published_objective(shape, dtype):
    taus = random_taus(shape).to(dtype)
    d = taus.double().sum(0).requires_grad_()
    adam = torch.optim.Adam([d], lr=1e-5)
    for _ in range(300):
        adam.zero_grad()
        interference(d, taus.double()).backward()
        adam.step()
    assert_close(wudi(taus, at(taus), steps=300, rate=1e-5), d.detach(), 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("towards", ["mean", "sum"])
def test_wudi_exact_matches_least_squares(shape, towards):
    taus = random_taus(shape).double()
    d = wudi_exact(taus, at(taus), ridge=0.0, towards=towards)
    start = taus.mean(0) if towards == "mean" else taus.sum(0)
    # rows of x solve x [tau_t^T / n_t]_t = [(tau_t - start) tau_t^T / n_t]_t with least norm
    units = np.concatenate([(tau / tau.norm()).numpy() for tau in taus])  # (T o, i)
    targets = np.concatenate([((tau - start) @ tau.mT / tau.norm()).numpy() for tau in taus], 1)  # (o, T o)
    x = np.linalg.lstsq(units, targets.T, rcond=1e-10)[0].T
    assert_close(d, start.numpy() + x, 1e-5)
    reported = objective(d, taus)
    assert reported == pytest.approx(float(interference(d, taus)), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("shape", [*SHAPES, (8, 30, 40), (3, 4, 50)])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_wudi_exact_interferes_no_more_than_adam(shape, size):
    taus = random_taus(shape, size=size)
    start = objective(taus.sum(0), taus)
    adam = objective(wudi(taus, at(taus), steps=300, rate=1e-5), taus)
    exact = objective(wudi_exact(taus, at(taus), ridge=1e-6, towards="sum"), taus)
    assert exact <= adam + 1e-6 * start
    if len(taus) > 1:
        assert adam < start


def test_wudi_ignores_experts_that_did_not_move():
    taus = random_taus((3, 6, 8))
    padded = torch.cat([taus, torch.zeros(1, 6, 8)])
    assert_close(wudi(padded, at(padded), steps=50, rate=1e-4), wudi(taus, at(taus), steps=50, rate=1e-4))
    exact = [wudi_exact(x, at(x), ridge=1e-6, towards="sum") for x in (padded, taus)]
    assert_close(*exact)


# -- RegMean --------------------------------------------------------------------------------------------------------


def test_regmean_by_hand():
    """Each expert decides about the input only it has seen; nobody has seen the third: the mean."""
    grams = {"w": [torch.diag(tensor(1, 0, 0)), torch.diag(tensor(0, 4, 0))]}
    assert_close(from_zero("regmean", [[1, 2, 3]], [[5, 6, 7]], grams=grams), [[1, 6, 5]])
    shared = {"w": [torch.diag(tensor(3)), torch.diag(tensor(1))]}
    assert_close(from_zero("regmean", [[1]], [[5]], grams=shared), [[2]])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("off_diagonal", [0.0, 0.9, 1.0])
def test_regmean_matches_its_formula(shape, off_diagonal):
    generator = torch.Generator().manual_seed(4)
    experts, rows, width = shape
    w0 = torch.randn(rows, width, generator=generator)
    wt = [w0 + tau for tau in random_taus(shape)]
    inputs = [torch.randn(50, width, generator=generator) for _ in range(experts)]
    grams = [x.mT @ x / 50 for x in inputs]
    merged = merge("regmean", {"w": w0}, [{"w": w} for w in wt], grams={"w": grams}, off_diagonal=off_diagonal)["w"]
    scaled = [np.where(np.eye(width), g, off_diagonal * g.double().numpy()) for g in grams]
    left = sum(w.double().numpy() @ g for w, g in zip(wt, scaled, strict=True))
    assert_close(merged, left @ np.linalg.inv(sum(scaled)))


def test_regmean_uses_the_weights_block_where_a_bias_joined():
    taus = [random_taus((4, 5), t) for t in range(2)]
    inputs = [torch.cat([random_taus((30, 5), 5 + t, 1.0), torch.ones(30, 1)], 1) for t in range(2)]
    joined = [x.mT @ x / 30 for x in inputs]
    plain = [g[:5, :5] for g in joined]
    assert_close(
        from_zero("regmean", *taus, grams={"w": joined}), from_zero("regmean", *taus, grams={"w": plain}), 1e-6
    )


def test_regmean_minimises_the_experts_output_error():
    """Without shrinking off-diagonals nothing does better on the experts' own inputs."""
    taus = random_taus((3, 4, 6), size=1.0)
    inputs = random_taus((3, 20, 6), 3, 1.0)
    grams = tuple(x.mT @ x for x in inputs)

    def error(d):
        return float(sum(((x @ (d - tau).mT) ** 2).sum() for x, tau in zip(inputs, taus, strict=True)))

    d = regmean(taus, at(taus, grams), off_diagonal=1.0)
    for seed in range(20):
        assert error(d) < error(d + random_taus((4, 6), seed, 0.01))


def test_regmean_averages_weights_without_grams():
    base = {"w": torch.zeros(2, 2), "v": torch.zeros(2, 2)}
    experts = [{"w": torch.eye(2), "v": torch.eye(2)}, {"w": -torch.eye(2), "v": 3 * torch.eye(2)}]
    grams = {"w": [torch.eye(2) * 3, torch.eye(2)]}
    merged = merge("regmean", base, experts, grams=grams)
    assert_close(merged["w"], np.eye(2) / 2)
    assert_close(merged["v"], 2 * np.eye(2))


def test_regmean_takes_a_convolution_with_one_output_for_a_weight():
    taus = [random_taus((1, 3, 2), t) for t in range(2)]
    inputs = random_taus((2, 20, 6), 3, 1.0)
    grams = {"w": [x.mT @ x for x in inputs]}
    flat = from_zero("regmean", *(tau.flatten(1) for tau in taus), grams=grams)
    assert_close(from_zero("regmean", *taus, grams=grams).flatten(1), flat)


def test_regmean_refuses_grams_that_do_not_fit():
    taus = [torch.ones(2, 3), torch.ones(2, 3)]
    for grams, match in (([torch.eye(3)], "1 Grams for 2 experts"), ([torch.eye(2)] * 2, r"a Gram is \(2, 2\)")):
        with pytest.raises(MergeError, match=match):
            from_zero("regmean", *taus, grams={"w": grams})
    with pytest.raises(MergeError, match="non-finite"):
        from_zero("regmean", *taus, grams={"w": [torch.full((3, 3), float("nan"))] * 2})


def test_every_matrix_kernel_commutes_with_a_change_of_basis_of_the_input():
    """Spectral and least-squares methods know no axes: rotating the inputs rotates the merge."""
    taus = random_taus((3, 6, 8))
    q = torch.linalg.qr(random_taus((8, 8), 3, 1.0)).Q
    for name in ("tsv", "iso_c", "iso_cts", "wudi_exact"):
        anchor = get(name)
        knobs = {k: v for k, v in anchor.defaults.items() if k != "scale"}
        straight, turned = (anchor.kernel(x, at(x), **knobs) for x in (taus, taus @ q))
        assert_close(turned, straight @ q, 1e-4)
