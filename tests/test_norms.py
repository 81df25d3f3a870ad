"""Norms: what their scales multiply, whatever the module, and the regression of gamma and beta."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from bmm.errors import BmmError, MergeError, RecipeError
from bmm.grams import GramStore, collect
from bmm.merging import prepare_model
from bmm.norms import prepare_norm
from bmm.recipe import Recipe
from bmm.records import Hyperparameters
from bmm.run import Run


class OnePlus(nn.Module):
    """Computes ``(1 + weight) * x / rms(x)``, as some language models do."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(width)), eps

    def forward(self, x):
        return (1 + self.weight) * x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()


class Variance(OnePlus):
    """transformers' form: ``weight * x / rms(x)``, with another name for the epsilon."""

    def __init__(self, width):
        super().__init__(width)
        self.variance_epsilon = self.__dict__.pop("eps")

    def forward(self, hidden_states):
        return self.weight * hidden_states * (hidden_states.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


class ChannelsFirst(nn.LayerNorm):
    """LayerNorm over the second axis of an image."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Crooked(OnePlus):
    """No norm: its output is not linear in its weight."""

    def forward(self, x):
        return self.weight.square() * x


def x_hat_of(module, x):
    """What gamma multiplies, by formula, as rows (n, c) in float64."""
    x = x.double().numpy()
    if isinstance(module, nn.BatchNorm2d):
        mean, var = module.running_mean.double().numpy(), module.running_var.double().numpy()
        hat = (x - mean[None, :, None, None]) / np.sqrt(var[None, :, None, None] + module.eps)
        return np.moveaxis(hat, 1, -1).reshape(-1, x.shape[1])
    if isinstance(module, nn.GroupNorm):
        split = x.reshape(len(x), module.num_groups, -1)
        hat = (split - split.mean(-1, keepdims=True)) / np.sqrt(split.var(-1, keepdims=True) + module.eps)
        return np.moveaxis(hat.reshape(x.shape), 1, -1).reshape(-1, x.shape[1])
    if isinstance(module, ChannelsFirst):
        x = np.moveaxis(x, 1, -1)
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    if isinstance(module, nn.LayerNorm):
        centred = rows - rows.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + module.eps)
    return rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6)


def batch_norm():
    module = nn.BatchNorm2d(4)
    module.running_mean.copy_(torch.arange(4.0))
    module.running_var.copy_(torch.arange(1.0, 5.0))
    return module


IMAGE, TOKENS = (6, 4, 5, 4), (6, 3, 4)
NORMS = [
    (lambda: nn.LayerNorm(4), TOKENS),
    (lambda: nn.LayerNorm(4, bias=False), TOKENS),
    (lambda: nn.RMSNorm(4, eps=1e-6), TOKENS),
    (lambda: nn.GroupNorm(2, 4), IMAGE),
    (batch_norm, IMAGE),
    (lambda: OnePlus(4), TOKENS),
    (lambda: Variance(4), TOKENS),
    (lambda: ChannelsFirst(4), IMAGE),
]


@pytest.mark.parametrize(("build", "shape"), NORMS, ids=lambda v: getattr(v, "__name__", None))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grams_of_every_kind_of_norm(build, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    module = build()
    with torch.no_grad():
        for parameter in module.parameters():  # what gamma and beta are must not matter
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    net = nn.Sequential(module).to(dtype).train()
    batches = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    grams = collect(net, lambda model, x: model(x), batches, norms=True)
    assert net.training
    rows = np.concatenate([x_hat_of(module, x) for x in batches])  # (n, c)
    if module._parameters.get("bias") is not None:
        stacked = np.stack([rows, np.ones_like(rows)], -1)  # (n, c, 2)
        assert grams.norm_bias == {"0.weight": "0.bias"}
    else:
        stacked = rows[:, :, None]
        assert grams.norm_bias == {}
    expected = np.einsum("ncj,nck->cjk", stacked, stacked) / len(rows)
    np.testing.assert_allclose(grams.norms["0.weight"].numpy(), expected, rtol=1e-4, atol=1e-5)
    assert grams.count["0.weight"] == len(rows)
    assert collect(net, lambda model, x: model(x), batches).norms == {}


def test_what_is_no_norm_is_skipped_with_a_reason():
    net = nn.ModuleDict({"crooked": Crooked(4), "norm": nn.LayerNorm(4), "idle": nn.LayerNorm(4)})
    with torch.no_grad():
        net["crooked"].weight.fill_(2.0)
    grams = collect(net, lambda m, x: m["norm"](m["crooked"](x)), [torch.randn(5, 4)], norms=True)
    assert set(grams.norms) == {"norm.weight"}
    assert "not affine" in grams.skipped["crooked.weight"]
    assert "never ran" in grams.skipped["idle.weight"]


def test_a_norm_whose_weight_another_uses_is_left_out():
    net = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    net[1].weight = net[0].weight
    assert collect(net, lambda m, x: m(x), [torch.randn(5, 4)], norms=True).norms == {}


def test_nan_among_the_inputs_is_an_error():
    net = nn.Sequential(nn.LayerNorm(4))
    with pytest.raises(BmmError, match=r"0\.weight"):
        collect(net, lambda m, x: m(x), [torch.full((3, 4), math.nan)], norms=True)


def problem(tasks=3, channels=5, k=2, seed=0, rows=40):
    """Weights (c, k) and Grams (c, k, k) of made-up inputs, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    w0, wa = 1 + normal(channels, k), 1 + normal(channels, k)
    experts = torch.stack([w0 + 0.3 * normal(channels, k) for _ in range(tasks)])
    x = normal(tasks, rows, channels, k)
    if k == 2:
        x[..., 1] = 1
    return w0, experts, torch.einsum("tncj,tnck->tcjk", x, x) / rows, wa


def dense(w0, experts, grams, wa, lam, rho=1.0, weights=None, normalise="trace"):
    """The posterior mean from its definition, channel by channel, in NumPy."""
    w0, experts, grams, wa = (t.double().numpy() for t in (w0, experts, grams, wa))
    weights = np.ones(len(experts)) if weights is None else np.asarray(weights)
    channels, k = w0.shape
    if normalise == "trace":
        grams = np.stack([g * channels * k / np.trace(g, axis1=1, axis2=2).sum() for g in grams])
    out = np.empty_like(w0)
    for c in range(channels):
        total = lam * np.eye(k) + sum(a * g[c] for a, g in zip(weights, grams, strict=True))
        right = lam * wa[c] + sum(a * w[c] @ g[c] for a, w, g in zip(weights, experts, grams, strict=True))
        out[c] = w0[c] + rho * (np.linalg.solve(total, right) - w0[c])
    return out


def test_one_channel_by_hand():
    """gamma alone, x_hat^2 = 4 on average, normalised to 1: halfway between expert and anchor at lam = 1."""
    prepared = prepare_norm(
        torch.tensor([[1.0]]), torch.tensor([[[3.0]]]), [torch.tensor([[[4.0]]])], torch.tensor([[2.0]])
    )
    assert prepared.merge(1.0).item() == pytest.approx(2.5)
    assert prepared.merge(1.0, 2.0).item() == pytest.approx(4.0)
    assert prepared.merge(1.0, 1.0, 0.0).item() == pytest.approx(2.0)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("lam", [1e-4, 0.3, 1.0, 1e3])
@pytest.mark.parametrize("normalise", ["trace", "none"])
def test_norms_equal_a_dense_float64_solve(k, lam, normalise):
    w0, experts, grams, wa = problem(k=k)
    weights = [1.0, 0.5, 2.0]
    prepared = prepare_norm(w0.float(), experts, list(grams), wa, weights, normalise)
    expected = dense(w0.float(), experts, grams, wa, lam, 0.9, weights, normalise)
    np.testing.assert_allclose(prepared.merge(lam, 0.9).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_limits_of_lam():
    w0, experts, grams, wa = problem()
    prepared = prepare_norm(w0.float(), experts, list(grams), wa.float())
    assert torch.equal(prepared.merge(math.inf), wa.float())
    np.testing.assert_allclose(prepared.merge(1e9), wa, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(prepared.merge(0.0), dense(w0, experts, grams, wa, 0.0), rtol=1e-5, atol=1e-6)
    alone = prepare_norm(w0.float(), experts[:1], [grams[0]], wa.float())
    np.testing.assert_allclose(alone.merge(0.0), experts[0], rtol=1e-5, atol=1e-6)


def test_one_task_gives_the_expert_on_its_inputs_and_the_anchor_off_them():
    """An x_hat that never moves leaves one direction of (gamma, beta) without evidence."""
    w0, experts, _, wa = problem(tasks=1)
    x = torch.tensor([0.5, 1.0], dtype=torch.float64)
    gram = torch.outer(x, x).expand(5, 2, 2)
    merged = prepare_norm(w0.float(), experts, [gram], wa).merge(0.0).double()
    off = torch.tensor([1.0, -0.5], dtype=torch.float64)
    torch.testing.assert_close(merged @ x, experts[0] @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged @ off, wa @ off, rtol=1e-5, atol=1e-5)


def test_order_of_tasks_and_zero_grams_change_nothing():
    w0, experts, grams, wa = problem()
    a = prepare_norm(w0, experts, list(grams), wa).merge(0.5)
    b = prepare_norm(w0, experts[[2, 0, 1]], list(grams[[2, 0, 1]]), wa).merge(0.5)
    c = prepare_norm(w0, torch.cat([experts, experts[:1] + 9]), [*grams, torch.zeros_like(grams[0])], wa).merge(0.5)
    for other in (b, c):
        torch.testing.assert_close(a, other, rtol=1e-9, atol=1e-9)
    empty = prepare_norm(w0, experts, [torch.zeros_like(g) for g in grams], wa)
    torch.testing.assert_close(empty.merge(0.1), wa, rtol=1e-9, atol=1e-9)


def test_samples_have_the_posterior_covariance():
    w0, experts, grams, wa = problem(channels=1)
    prepared = prepare_norm(w0, experts, list(grams), wa, normalise="none")
    generator = torch.Generator().manual_seed(1)
    draws = torch.cat([prepared.sample(0.7, 2.0, 0.1, generator) for _ in range(4000)]) - prepared.merge(0.7, 2.0)
    covariance = 4 * 0.01 * torch.linalg.inv(grams.sum(0)[0] + 0.7 * torch.eye(2))
    torch.testing.assert_close(draws.T @ draws / 4000, covariance, rtol=0.1, atol=0.05 * float(covariance.abs().max()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p | {"grams": p["grams"][:1]}, "one Gram per expert"),
        (lambda p: p | {"anchor": p["anchor"][:2]}, "anchor"),
        (lambda p: p | {"experts": p["experts"] * math.nan}, "non-finite"),
        (lambda p: p | {"weights": [1.0, -1.0, 1.0]}, "weights"),
        (lambda p: p | {"normalise": "trce"}, "trce"),
    ],
)
def test_bad_input_is_refused(change, said):
    w0, experts, grams, wa = problem()
    with pytest.raises(MergeError) as error:
        prepare_norm(**change({"w0": w0, "experts": experts, "grams": list(grams), "anchor": wa}))
    assert said in f"{error.value.message} {error.value.hint}"
    for lam in (-1.0, math.nan):
        with pytest.raises(MergeError, match="lam"):
            prepare_norm(w0, experts, list(grams), wa).merge(lam)


@pytest.fixture(scope="module")
def run(family):
    return Run(Recipe.from_dict(family.recipe(anchor="task_arithmetic", norms="regression")))


def test_a_model_with_norms_solved(run):
    grams, anchor = run.collect_grams(), run.anchor()
    plain = prepare_model(run.pool, anchor, [g.joined(g) for g in grams])
    assert [s.layout for s in plain.slots].count("norm") == 1
    assert plain.groups[-1] in {s.group for s in plain.slots}
    merged = plain.merge(Hyperparameters.uniform(plain.groups, 0.2, 1.1))

    def pair(tensors):
        return torch.stack([tensors["norm.weight"], tensors["norm.bias"]], 1).double()

    expected = dense(
        pair(run.pool.base),
        torch.stack([pair(e) for e in run.pool.experts]),
        torch.stack([g.norms["norm.weight"] for g in grams]),
        pair(anchor),
        0.2,
        1.1,
    )
    np.testing.assert_allclose(pair(merged).numpy(), expected, rtol=1e-5, atol=1e-6)
    exact = plain.merge(Hyperparameters.uniform(plain.groups, math.inf))
    assert all(torch.equal(exact[n], anchor[n]) for n in run.pool.names)


def test_norm_grams_are_cached_apart_from_those_without(family, tmp_path):
    with_norms = Run(Recipe.from_dict(family.recipe(norms="regression", cache=str(tmp_path))))
    without = Run(Recipe.from_dict(family.recipe(cache=str(tmp_path))))
    first, plain, again = with_norms.collect_grams(), without.collect_grams(), with_norms.collect_grams()
    assert len(list((tmp_path / "grams").iterdir())) == 2 * len(first)
    assert all(not g.norms for g in plain)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.norms["norm.weight"], two.norms["norm.weight"])
        assert one.norm_bias == two.norm_bias == {"norm.weight": "norm.bias"}
    store = GramStore(tmp_path / "grams")
    assert store.notices == []


def test_norms_need_data():
    with pytest.raises(RecipeError, match="needs calibration inputs"):
        Recipe.from_dict({"norms": "regression", "grams": "datafree"})
