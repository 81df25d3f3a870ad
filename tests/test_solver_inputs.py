"""What the solver takes: convolutions, shared spectra, biases; samples of the posterior; what it refuses."""

import math

import pytest
import torch

from bmm.errors import MergeError
from bmm.grams.spectrum import decompose
from bmm.solver import join_bias, prepare, split_bias
from tests.problems import generator, pooled_of, problem


def test_convolutions_keep_their_shape_and_stacked_experts_work():
    w0, ws, _, anchor = problem(o=5, i=12)
    _, _, grams, _ = problem(i=12, rank=8)
    flat = prepare(w0, ws, grams, anchor).merge(0.5)
    conv = prepare(
        w0.reshape(5, 3, 2, 2), torch.stack(ws).reshape(3, 5, 3, 2, 2), grams, anchor.reshape(5, 3, 2, 2)
    ).merge(0.5)
    assert conv.shape == (5, 3, 2, 2)
    torch.testing.assert_close(conv.flatten(1), flat)


def test_shared_spectrum_gives_the_same_and_refuses_other_grams():
    w0, ws, grams, anchor = problem(rank=4)
    spectrum = decompose(grams)
    shared = prepare(w0, ws, grams, anchor, spectrum=spectrum)
    assert torch.equal(shared.merge(0.7), prepare(w0, ws, grams, anchor).merge(0.7))
    assert shared.basis.data_ptr() == prepare(w0, ws, grams, anchor, spectrum=spectrum).basis.data_ptr()
    for changed in (
        {"grams": [grams[1], grams[0], grams[2]]},
        {"weights": [1.0, 1.0, 2.0]},
        {"normalise": "none"},
    ):
        with pytest.raises(MergeError, match="spectrum"):
            prepare(w0, ws, **({"grams": grams} | changed), anchor=anchor, spectrum=spectrum)


@pytest.mark.parametrize("rank", [3, 8])
def test_samples_have_the_posterior_mean_and_covariance(rank):
    w0, ws, grams, anchor = problem(o=400, i=8, rank=rank, experts=1)
    prepared = prepare(w0, ws, grams, anchor)
    lam, sigma, rho = 0.5, 0.3, 1.2
    g = generator(1)
    mean = prepared.merge(lam, rho)
    noise = torch.cat([(prepared.sample(lam, rho, sigma, g) - mean).double() for _ in range(50)])  # (20000, i)
    expected = (rho * sigma) ** 2 * torch.linalg.inv(sum(pooled_of(grams)) + lam * torch.eye(8, dtype=torch.float64))
    covariance = noise.T @ noise / len(noise)
    assert float((covariance - expected).abs().max() / expected.abs().max()) < 0.05
    assert float(noise.mean(0).abs().max()) < 5 * math.sqrt(float(expected.max()) / len(noise))


def test_sampling_is_seeded_and_has_its_limits():
    w0, ws, grams, anchor = problem(rank=3, experts=1)
    prepared = prepare(w0, ws, grams, anchor)
    one, again, other = (prepared.sample(1.0, 1.0, 0.1, generator(s)) for s in (5, 5, 6))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(prepared.sample(1.0, 1.0, 0.0, generator()), prepared.merge(1.0))
    assert torch.equal(prepared.sample(math.inf, 1.0, 0.1, generator()), anchor)
    with pytest.raises(MergeError, match="no evidence"):
        prepared.sample(0.0, 1.0, 0.1, generator())
    with pytest.raises(MergeError, match="sigma"):
        prepared.sample(1.0, 1.0, -0.1, generator())
    full = prepare(w0, ws, [torch.eye(10)], anchor)
    assert torch.isfinite(full.sample(0.0, 1.0, 0.1, generator())).all()


def test_to_and_bytes():
    w0, ws, grams, anchor = problem(o=6, i=10, rank=2, experts=1)
    prepared = prepare(w0, ws, grams, anchor)
    assert prepared.bytes == 4 * (3 * 60 + 2 * 12 + 20) + 8 * 2
    assert torch.equal(prepared.to("cpu").merge(0.5), prepared.merge(0.5))
    assert prepare(w0, ws, grams, anchor, device="cpu").to("meta").merge(math.inf).device.type == "meta"


def test_bias_joins_and_parts():
    weight, bias = torch.randn(4, 2, 3, 3, generator=generator()), torch.randn(4, generator=generator(1))
    joined = join_bias(weight, bias)
    assert joined.shape == (4, 19)
    back, vector = split_bias(joined, weight.shape)
    assert torch.equal(back, weight)
    assert torch.equal(vector, bias)
    assert torch.equal(split_bias(joined)[0], weight.flatten(1))
    with pytest.raises(MergeError, match="bias"):
        join_bias(weight, bias[:3])


def nan_at(tensor):
    return tensor.clone().index_fill(1, torch.tensor([0]), math.nan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(experts=[]), "no experts"),
        (lambda p: p.update(grams=p["grams"][:2]), "3 experts but 2 Grams"),
        (lambda p: p.update(anchor=p["anchor"][:, :9]), "anchor is"),
        (lambda p: p.update(experts=[*p["experts"][:2], p["w0"][:5]]), "expert 2 is"),
        (lambda p: p.update(grams=[torch.eye(11)] * 3), "Gram is"),
        (lambda p: p.update(grams=[*p["grams"][:2], torch.eye(9)]), "Gram 2 has shape"),
        (lambda p: p.update(weights=[1.0, -1.0, 1.0]), "task weights"),
        (lambda p: p.update(weights=[1.0, math.nan, 1.0]), "task weights"),
        (lambda p: p.update(weights=[1.0]), "1 task weights"),
        (lambda p: p.update(anchor=nan_at(p["anchor"])), "anchor holds 6 non-finite"),
        (lambda p: p.update(w0=nan_at(p["w0"])), "base holds"),
        (lambda p: p.update(experts=[p["w0"], nan_at(p["w0"]), p["w0"]]), "expert 1 holds"),
        (lambda p: p.update(grams=[p["grams"][0], nan_at(p["grams"][1]), p["grams"][2]]), "Gram 1"),
        (lambda p: p.update(grams=[-g for g in p["grams"]]), "trace"),
        (lambda p: p.update(normalise="max"), "normalisation"),
        (lambda p: p.update(w0=p["w0"][0]), "weight has shape"),
    ],
)
def test_bad_input_is_named(change, message):
    parts = dict(zip(("w0", "experts", "grams", "anchor"), problem(), strict=True))
    change(parts)
    with pytest.raises(MergeError, match=message) as caught:
        prepare(**parts, name="blocks.0.q")
    assert "blocks.0.q" in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    "arguments", [(-1.0,), (math.nan,), (1.0, math.nan), (1.0, math.inf), (1.0, 1.0, math.nan), (torch.ones(2),)]
)
def test_bad_hyperparameters_are_refused(arguments):
    prepared = prepare(*problem())
    with pytest.raises(MergeError, match=r"lam|rho|anchor_scale"):
        prepared.merge(*arguments)
