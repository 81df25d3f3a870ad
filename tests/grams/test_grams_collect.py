"""Grams from hooks against Grams of activations written down by hand, for every kind of module."""

import pytest
import torch
from torch import nn

from bmm.errors import GramError
from bmm.grams import collect
from tests.grams.modules import batches_of, check, plain, seeded


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False)
        self.spare = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc2(self.norm(self.fc1(x).relu()))


@pytest.mark.parametrize("shape", [(5,), (6, 5)])
def test_linear(shape):
    model, batches = seeded(MLP), batches_of(*shape)
    found = collect(model, plain, batches)
    x = torch.cat(batches)
    check(found, "fc1.weight", x)
    check(found, "fc2.weight", model.norm(model.fc1(x).relu()), bias=False)
    assert found.bias_of == {"fc1.weight": "fc1.bias"}
    assert found.layout == {"fc1.weight": "linear", "fc2.weight": "linear"}
    assert found.grams["fc1.weight"].dtype == torch.float64
    assert found.skipped == {"spare.weight": "its module never ran on the calibration inputs"}
    with pytest.raises(GramError, match="never ran"):
        found.for_weight("spare.weight")
    with pytest.raises(GramError, match=r"no weight fc3.weight") as caught:
        found.for_weight("fc3.weight")
    assert "did you mean" in caught.value.hint


def test_without_bias_and_restricted_to_names():
    model, batches = seeded(MLP), batches_of(5)
    found = collect(model, plain, batches, names={"fc1.weight"}, bias=True)
    assert list(found.grams) == ["fc1.weight"]
    check(found, "fc1.weight", torch.cat(batches), bias=False)  # its bias was not asked for
    assert found.skipped == {}
    check(collect(model, plain, batches, names={"fc1.weight", "fc1.bias"}), "fc1.weight", torch.cat(batches))
    found = collect(model, plain, batches, bias=False)
    check(found, "fc1.weight", torch.cat(batches), bias=False)
    assert found.bias_of == {}
    with pytest.raises(GramError, match=r"no parameter fc9.weight"):
        collect(model, plain, batches, names={"fc9.weight"})


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 2), "bias": False},
    "same": {"kernel_size": 4, "padding": "same"},  # an even kernel pads one side more
    "valid": {"kernel_size": 3, "padding": "valid"},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": "same", "padding_mode": "circular", "dilation": (1, 2)},
    "patches": {"kernel_size": 4, "stride": 4},
}


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_conv2d(kind):
    options = CONVOLUTIONS[kind]
    model = nn.Sequential(seeded(lambda: nn.Conv2d(2, 5, **options)))
    batches = batches_of(2, 8, 9)
    found = collect(model, plain, batches)
    taps = model[0].weight[0].numel()
    probe = nn.Conv2d(2, taps, **options)  # one-hot kernels: the convolution itself writes its patches down
    probe.weight.data = torch.eye(taps).reshape(taps, *model[0].weight.shape[1:])
    if probe.bias is not None:
        probe.bias.data.zero_()
    check(found, "0.weight", probe(torch.cat(batches)).movedim(1, -1), bias=options.get("bias", True))
    assert found.layout == {"0.weight": "conv2d"}


def test_conv2d_without_a_batch_dimension_and_in_small_chunks(monkeypatch):
    model, batch = nn.Sequential(seeded(lambda: nn.Conv2d(2, 3, 3))), batches_of(2, 6, 6)[0]
    whole = collect(model, plain, [batch])
    single = collect(model, plain, list(batch))
    torch.testing.assert_close(single.for_weight("0.weight"), whole.for_weight("0.weight"))
    assert single.count == whole.count
    monkeypatch.setattr("bmm.grams.sites.PATCH_ELEMENTS", 1)
    torch.testing.assert_close(collect(model, plain, [batch]).for_weight("0.weight"), whole.for_weight("0.weight"))


class Twin(nn.Module):
    """Convolutions on one input: two cut the same patches, one others."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 5, 3, padding=1)
        self.c = nn.Conv2d(2, 3, 3)
        self.grouped = nn.Conv2d(2, 4, 3, groups=2)

    def forward(self, x):
        return self.a(x), self.b(x), self.c(x), self.grouped(x)


def test_convolutions_share_where_patches_agree_and_groups_are_skipped():
    found = collect(seeded(Twin), plain, batches_of(2, 6, 6))
    assert found.key_of == {"a.weight": "a.weight", "b.weight": "a.weight", "c.weight": "c.weight"}
    assert found.skipped == {"grouped.weight": "convolution in 2 groups"}


class Attention(nn.Module):
    """q, k, v on one tensor; v without bias; k2 on an equal tensor that is another object; q2 after a change."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(4, 4, bias=False)
        self.k2, self.q2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = x * 1.0
        out = self.q(x).sum() + self.k(x).sum() + self.v(x).sum() + self.k2(x.clone()).sum()
        x.add_(1.0)
        return out + self.q2(x).sum()


@pytest.mark.parametrize("inference", [False, True])
def test_only_the_very_same_content_is_shared(inference):
    def forward(model, batch):
        with torch.inference_mode(inference):
            return model(batch)

    model, batches = seeded(Attention), batches_of(3, 4)
    found = collect(model, forward, batches)
    assert found.key_of == {
        "q.weight": "q.weight", "k.weight": "q.weight", "v.weight": "v.weight", "k2.weight": "k2.weight",
        "q2.weight": "q2.weight",
    }  # fmt: skip
    x = torch.cat(batches)
    check(found, "k.weight", x)
    check(found, "v.weight", x, bias=False)
    check(found, "k2.weight", x)
    check(found, "q2.weight", x + 1)
    assert not any(g.is_inference() or g.requires_grad for g in found.grams.values())
    together = collect(model, forward, batches, bias=False)
    assert together.key_of["v.weight"] == together.key_of["k.weight"] == "q.weight"
    assert found.bytes == 8 * (3 * 25 + 16)
    assert found.to(torch.float32).bytes == found.bytes // 2


class Switching(nn.Module):
    """a and b read the same tensor in some forwards only; c runs in some only."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.read = {"a": [], "b": [], "c": []}

    def call(self, name, x):
        self.read[name].append(x.clone())
        return getattr(self, name)(x)

    def forward(self, x, steps):
        other = x * 2
        for name, which in steps:
            self.call(name, other if which == "other" else x)


PLANS = {
    "always": [[("a", "x"), ("b", "x")]] * 3,
    "first only": [[("a", "x"), ("b", "x")], [("a", "x"), ("b", "other")], [("a", "x"), ("b", "x")]],
    "partly": [[("a", "x"), ("a", "other"), ("b", "x"), ("b", "other")], [("a", "x"), ("b", "x"), ("b", "other")]],
    "late": [[("a", "x"), ("b", "other")], [("a", "x"), ("b", "x")]],
    "missing": [[("a", "x"), ("b", "x"), ("c", "x")], [("a", "x"), ("c", "x")], [("c", "x"), ("a", "x"), ("b", "x")]],
    "appearing": [[("a", "x")], [("a", "x"), ("b", "x"), ("c", "x")], [("b", "other"), ("c", "other")]],
    "repeated": [[("a", "x"), ("b", "x"), ("a", "x"), ("b", "x")], [("b", "x"), ("a", "x")]],
    "longer": [[("a", "x"), ("b", "x"), ("b", "other")], [("a", "x"), ("b", "other")], [("a", "x"), ("b", "x")]],
    "joining": [[("a", "x"), ("b", "x")], [("a", "x"), ("c", "x"), ("c", "other")], [("c", "x")]],
    "crossed": [[("a", "x"), ("b", "other"), ("a", "other"), ("b", "x")]] * 2,
}


SHARED = {
    "always": [{"a", "b"}], "first only": [], "partly": [], "late": [], "missing": [{"a", "c"}],
    "appearing": [{"b", "c"}], "repeated": [{"a", "b"}], "longer": [], "joining": [], "crossed": [],
}  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
def test_sharing_is_confirmed_in_every_batch_and_sums_are_right_when_it_ends(plan):
    model = seeded(Switching)
    inputs = list(zip(batches_of(3, sizes=(4, 2, 5)), PLANS[plan], strict=False))
    found = collect(model, lambda m, batch: m(*batch), inputs)
    for name, read in model.read.items():
        if read:
            check(found, f"{name}.weight", torch.cat(read))
        else:
            assert f"{name}.weight" in found.skipped
    keys = {}
    for name, key in found.key_of.items():
        keys.setdefault(key, set()).add(name[0])
    assert [group for group in keys.values() if len(group) > 1] == SHARED[plan]


def test_tied_weights_sum_over_their_uses():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight, self.b.bias = self.a.weight, self.a.bias
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight
            self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 4)
            self.d.weight = self.c.weight  # with a bias of its own
            self.e, self.f = nn.Linear(4, 4), nn.Linear(4, 4)
            self.f.bias = self.e.bias  # with a weight of its own

        def forward(self, x):
            y = self.a(x)
            return self.head(self.b(y) + self.c(x) + self.d(x) + self.e(x) + self.f(x))

    model, batches = seeded(Tied), batches_of(4)
    found = collect(model, plain, batches)
    x = torch.cat(batches)
    check(found, "a.weight", torch.cat([x, model.a(x)]))
    assert found.key_of["b.weight"] == "a.weight"
    assert found.bias_of == {"a.weight": "a.bias", "b.weight": "b.bias"}
    assert found.skipped["embed.weight"] == found.skipped["head.weight"]
    assert found.skipped["embed.weight"].startswith("tied: Embedding")
    assert "another bias" in found.skipped["c.weight"]
    assert not found.has_bias[found.key_of["e.weight"]]  # one bias, two weights: it joins neither
