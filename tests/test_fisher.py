"""Diagonal Fishers: against closed forms and plain autograd, in bounded memory, cached, and in whole runs."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bmm
import bmm.functions
from bmm.errors import GramError, MergeError
from bmm.evaluation.task import categorical, draw_labels
from bmm.fisher import Source, collect
from tests.fishers import assert_close, by_hand, forward, inputs, seeded


def source(batches, apply=forward, **options):
    return Source("t", apply, batches, options.pop("log_likelihood", categorical), draw_labels, seeded(3))


class Branching(nn.Module):
    """Data-dependent control flow: vmap refuses it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.a(x) if float(x.sum()) > 0 else self.b(x)


class Small(nn.Module):
    """Convolution, norms with and without running statistics, attention, tied weights, a parameter nobody uses."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 8, 1)
        self.bn = nn.BatchNorm1d(8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        h = self.layer(self.bn(self.conv(x[:, None])).mT)
        return self.two(torch.tanh(self.one(h.mean(1))))


def test_a_linear_softmax_by_hand():
    """d log p_y / d W = (onehot - p) x', so the Fisher is the mean of its square."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), inputs()
    y = torch.arange(12) % 3
    p = model(x).softmax(-1)
    residual = (F.one_hot(y, 3) - p).detach().double()
    found = collect(model, [source([(x, y)])])
    expected = {
        "weight": torch.einsum("no,ni->oi", residual**2, x.double() ** 2) / 12,
        "bias": (residual**2).mean(0),
    }
    assert_close(found, expected)
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in found.values())


def test_every_kind_of_module_agrees_with_one_backward_pass_an_example():
    torch.manual_seed(0)
    model, x = Small(), inputs(9, 5)
    y = torch.arange(9) % 8
    model.bn.running_mean += 0.3
    model.train()
    model.requires_grad_(False)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch says so where it goes example by example under the hood
        found = collect(model, [source([(x[:4], y[:4]), (x[4:], y[4:])])])
    assert model.training
    assert model.layer.training
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()
    model.eval().requires_grad_(True)
    expected = by_hand(model, x, y)
    assert torch.equal(found["one.weight"], found.pop("two.weight"))  # one parameter under both of its names
    assert_close(found, expected)
    assert not found["unused"].any()
    assert (found["layer.self_attn.in_proj_weight"] > 0).any()


def test_modules_vmap_cannot_enter_are_done_one_by_one():
    torch.manual_seed(0)
    model, x = Branching(), inputs()
    y = torch.arange(12) % 3
    assert 0 < (x.sum(1) > 0).sum() < 12
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(model)(x)
    assert_close(collect(model, [source([(x, y)])]), by_hand(model, x, y))


@pytest.mark.parametrize("targets", ["given", "sampled"])
def test_memory_bounds_the_chunk_and_changes_nothing_else(targets, monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), inputs()
    y = torch.arange(12) % 3 if targets == "given" else None
    each = 4 * sum(p.numel() for p in model.parameters())
    sizes = []

    def found(memory, cut):
        sizes.clear()
        batches = [(x[a:b], None if y is None else y[a:b]) for a, b in cut]
        return collect(model, [source(batches)], memory=memory, progress=sizes.append)

    whole = found(100 * each, [(0, 12)])
    assert sizes == [12]
    for memory, cut, steps in (
        (5 * each, [(0, 12)], [5, 10, 12]),
        (each, [(0, 12)], list(range(1, 13))),
        (0, [(0, 7), (7, 12)], list(range(1, 13))),
        (100 * each, [(0, 7), (7, 12)], [7, 12]),
    ):
        assert_close(found(memory, cut), whole)
        assert sizes == steps


def test_sampled_labels_estimate_the_expectation_over_the_model():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), inputs(6)
    many = x.repeat(4000, 1)
    p, y = model(x).softmax(-1).detach(), torch.arange(3)
    expected = sum(p[:, k, None, None] * ((F.one_hot(y[k], 3) - p)[:, :, None] * x[:, None]) ** 2 for k in range(3))
    found = collect(model, [source([(many, None)])])
    torch.testing.assert_close(found["weight"], expected.mean(0), rtol=0.05, atol=1e-3)
    again = collect(model, [source([(many, None)])])
    assert torch.equal(found["weight"], again["weight"])


def test_drawn_labels_have_the_odds_of_the_logits():
    logits = torch.tensor([0.5, 0.2, 0.3]).log().expand(30_000, 3)
    drawn = draw_labels(logits, seeded())
    torch.testing.assert_close(drawn.bincount() / 30_000, torch.tensor([0.5, 0.2, 0.3]), rtol=0.03, atol=0)
    parts = seeded()
    assert torch.equal(drawn, torch.cat([draw_labels(part, parts) for part in logits.split(777)]))
    sure = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(100, 3)
    assert set(draw_labels(sure, seeded()).tolist()) == {1}
    assert draw_labels(torch.zeros(4, 6, 9), seeded()).shape == (4, 6)


def test_log_likelihood_of_sequences_skips_padding():
    outputs, targets = torch.randn(2, 3, 5, generator=seeded()), torch.tensor([[0, 4, -100], [2, -100, -100]])
    losses = F.cross_entropy(outputs.mT, targets, reduction="none", ignore_index=-100)
    torch.testing.assert_close(categorical(outputs, targets), -losses.sum(1))
    assert categorical(outputs.half(), targets).dtype == torch.float32


def test_keyword_inputs_and_pooled_sources():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, features, scale):
            return self.linear(features) * scale[:, None]

    torch.manual_seed(0)
    model, x, scale = Net(), inputs(), torch.rand(12) + 0.5
    y = torch.arange(12) % 3

    def part(a, b):
        return source([({"features": x[a:b], "scale": scale[a:b]}, y[a:b])], bmm.evaluation.run_model)

    found = collect(model, [part(0, 5), part(5, 12)], names=["linear.weight"])
    assert list(found) == ["linear.weight"]
    alone = [collect(model, [part(a, b)])["linear.weight"] for a, b in ((0, 5), (5, 12))]
    torch.testing.assert_close(found["linear.weight"], (5 * alone[0] + 7 * alone[1]) / 12)


def test_what_cannot_be_collected_is_named():
    model, x, y = nn.Linear(4, 3), inputs(), torch.arange(12) % 3
    with pytest.raises(GramError, match="no calibration inputs"):
        collect(model, [source([])])
    with pytest.raises(GramError, match="no parameter bais"):
        collect(model, [source([(x, y)])], names=["bais"])
    with pytest.raises(GramError, match="'t': 3 targets for 12"):
        collect(model, [source([(x, y[:3])])])
    with pytest.raises(GramError, match="task 't': no gradient of its log-likelihood: RuntimeError"):
        collect(model, [source([(x[:, :2], y)])])
    with pytest.raises(GramError, match=r"shape \(3,\) for one example"):
        collect(model, [source([(x, y)], log_likelihood=lambda outputs, targets: outputs[0])])
    with pytest.raises(MergeError, match="weight: its Fisher holds"):
        collect(model, [source([(x * torch.inf, y)])])


def test_a_likelihood_of_ones_own():
    """Gaussian regression: the gradient is (y - w x) x."""
    model, x, y = nn.Linear(4, 1, bias=False), inputs(), torch.linspace(-1, 1, 12)
    found = collect(model, [source([(x, y)], log_likelihood=lambda out, t: -((out[:, 0] - t) ** 2) / 2)])
    residual = (y - model(x)[:, 0]).detach()
    torch.testing.assert_close(found["weight"][0], ((residual[:, None] * x) ** 2).mean(0))
