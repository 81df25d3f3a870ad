"""DARE: what is dropped, and by which draws."""

import itertools

import torch

from bmm.anchors import merge
from bmm.anchors.dare import drop_and_rescale
from tests.anchors.kernels import assert_close, from_zero, random_taus, reference_ties


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
