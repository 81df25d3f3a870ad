"""Diagonal Fishers: against closed forms and plain autograd, in bounded memory, cached, and in whole runs."""

import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bmm
import bmm.functions
from bmm.checkpoint import Checkpoint
from bmm.errors import GramError, MergeError, RecipeError
from bmm.evaluation.task import categorical, draw_labels
from bmm.fisher import FisherStore, Source, collect
from bmm.recipe import Recipe
from bmm.run import Run
from bmm.statistics import Fishers
from tests.family import TASKS


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(n=12, width=4):
    return torch.randn(n, width, generator=seeded(n))


def forward(model, x):
    return model(x)


def source(batches, apply=forward, **options):
    return Source("t", apply, batches, options.pop("log_likelihood", categorical), draw_labels, seeded(3))


def by_hand(model, x, y, apply=forward):
    """Mean of squared gradients, one backward pass an example."""
    parameters = dict(model.named_parameters())
    total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
    for k in range(len(y)):
        loss = F.cross_entropy(apply(model, x[k : k + 1]), y[k : k + 1])
        for (name, _), g in zip(
            parameters.items(), torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True
        ):
            total[name] += 0 if g is None else g.double().square()
    return {n: v / len(y) for n, v in total.items()}


def assert_close(a, b, rtol=1e-5):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name].double(), b[name].double(), rtol=rtol, atol=1e-9)


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


# -- tasks, recipe, cache ----------------------------------------------------------------------------------------------


def labels(family):
    """Labels for the family's calibration inputs; they need not be right."""
    return {t.name: torch.arange(len(t.calibration)) % 4 for t in tasks(family)}


def tasks(family):
    return bmm.functions.load_function(f"{family.file}:tasks", "tasks")()


def opened(family, folder, given=None, **keys):
    return Run(Recipe.from_dict(family.recipe(cache=str(folder), calibration=20, **keys)), tasks=given)


def test_labelled_calibration_comes_whole_or_in_batches():
    x, y = inputs(10), torch.arange(10)
    whole = bmm.Task("t", (x, y), calibration=x, calibration_targets=y)
    batches = bmm.Task("t", (x, y), calibration=[x[:4], x[4:]], calibration_targets=[y[:4], y[4:]])
    mixed = bmm.Task("t", (x, y), calibration=[x[:4], x[4:]], calibration_targets=y)
    for task in (whole, batches, mixed):
        found = list(task.labelled_calibration(7, 3))
        assert torch.equal(torch.cat([a for a, _ in found]), x[:7])
        assert torch.equal(torch.cat([b for _, b in found]), y[:7])
    for short in (replace(whole, calibration_targets=y[:8]), replace(batches, calibration_targets=[y[:4]])):
        with pytest.raises(RecipeError, match="calibration targets for a batch of"):
            list(short.labelled_calibration())


def test_true_labels_are_never_taken_from_elsewhere(family, tmp_path):
    with pytest.raises(RecipeError, match="no calibration targets") as error:
        opened(family, tmp_path, fisher="true").collect_fishers()
    assert "fisher: sampled" in error.value.hint
    assert not (tmp_path / "fisher").exists()


def test_a_likelihood_without_sampler_is_refused(family, tmp_path):
    own = [replace(t, log_likelihood=lambda out, y: categorical(out, y)) for t in tasks(family)]
    with pytest.raises(RecipeError, match="no way to sample") as error:
        opened(family, tmp_path, own).collect_fishers()
    assert "sample=function" in error.value.hint
    able = [replace(t, sample=lambda out, generator: draw_labels(out, generator)) for t in own]
    assert len(opened(family, tmp_path, able).collect_fishers()) == len(TASKS)


def test_true_and_sampled_fishers_of_a_run(family, tmp_path):
    known = labels(family)
    given = [replace(t, calibration_targets=known[t.name]) for t in tasks(family)]
    true = opened(family, tmp_path, given, fisher="true")
    found = true.collect_fishers()
    model = true.skeleton
    for fisher, task, expert in zip(found, true.tasks, true.pool.experts, strict=True):
        model.load_state_dict({n: expert[n] for n in expert})
        model.requires_grad_(True)
        expected = by_hand(model, task.calibration[:20], known[task.name][:20], task.forward)
        assert_close(dict(fisher), expected)
    sampled = opened(family, tmp_path).collect_fishers()
    assert set(sampled[0]) == set(found[0]) == {n for n, _ in model.named_parameters()}
    assert not torch.equal(sampled[0]["q.weight"], found[0]["q.weight"])


def stamps(folder):
    return {f.name: f.stat().st_mtime_ns for f in (folder / "fisher").iterdir()}


def test_fishers_are_cached_read_lazily_and_rebuilt_when_stale(family, tmp_path):
    first = opened(family, tmp_path)
    found, base = first.collect_fishers(), first.collect_base_fisher()
    assert all(isinstance(f, Checkpoint) for f in (*found, base))  # on disk, not in memory
    before = stamps(tmp_path)
    assert len(before) == len(TASKS) + 1
    notices = []

    def progress(stage, done, total, detail=""):
        if stage == "notice":
            notices.append(detail)

    again = opened(family, tmp_path)
    again.progress = progress
    assert all(torch.equal(a[n], b[n]) for a, b in zip(found, again.collect_fishers(), strict=True) for n in a)
    assert stamps(tmp_path) == before
    kept = {n: found[0][n] for n in found[0]}
    raw = bytearray(found[0].path.read_bytes())
    raw[-5] ^= 0x40
    found[0].path.write_bytes(raw)
    rebuilt = again.collect_fishers()[0]
    assert all(torch.equal(rebuilt[n], kept[n]) for n in kept)
    assert len(notices) == 1
    assert "Fisher cache" in notices[0]
    assert "rebuilding" in notices[0]
    for changed in ({"seed": 1}, {"batch_size": 7}, {"calibration": 19}):
        count = len(stamps(tmp_path))
        Run(Recipe.from_dict(family.recipe(cache=str(tmp_path), **({"calibration": 20} | changed)))).collect_fishers()
        assert (len(stamps(tmp_path)) > count) == ("batch_size" not in changed)


class Head:
    """A forward that is an object with its head in an attribute."""

    def __init__(self, head):
        self.head = head

    def __call__(self, net, x):
        return net(x) @ self.head.T


def apply_head(net, x, head):
    return net(x) @ head.T


def closed_over(head):
    return lambda net, x: net(x) @ head.T


@pytest.mark.parametrize("make", [lambda h: partial(apply_head, head=h), closed_over, Head], ids=str)
def test_a_changed_head_makes_the_cache_stale(family, tmp_path, make):
    def headed(scale):
        return [replace(t, forward=make(t.forward.__defaults__[0] * scale)) for t in tasks(family)]

    one = opened(family, tmp_path, headed(1.0)).collect_fishers()
    count = len(stamps(tmp_path))
    two = opened(family, tmp_path, headed(2.0)).collect_fishers()
    assert len(stamps(tmp_path)) == 2 * count
    assert not torch.equal(one[0]["q.weight"], two[0]["q.weight"])
    assert opened(family, tmp_path, headed(1.0)).collect_fishers()[0].path == one[0].path


def test_the_order_of_the_tasks_changes_no_fisher(family, tmp_path):
    run = opened(family, tmp_path)
    turned = opened(family, tmp_path / "other", experts=dict(reversed(family.experts.items())))
    forward_, backward = run.collect_fishers(), turned.collect_fishers()
    for a, b in zip(forward_, reversed(backward), strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)
    one, other = run.collect_base_fisher(), turned.collect_base_fisher()
    assert_close(dict(one), dict(other))
    assert one.path.name == other.path.name


def test_the_base_fisher_pools_the_tasks(family, tmp_path):
    run = opened(family, tmp_path)
    collector = Fishers(
        run.recipe, run.skeleton, run.pool.float_names, {}, FisherStore(tmp_path / "fisher"), run.device
    )
    each = [collector.of(run.pool.base, [task]) for task in run.tasks]
    pooled = run.collect_base_fisher()
    assert_close(dict(pooled), {n: sum(f[n] for f in each) / len(each) for n in pooled})


def test_a_cache_that_cannot_be_written_costs_memory_not_the_run(family, tmp_path):
    (tmp_path / "fisher").write_text("in the way")
    run = opened(family, tmp_path)
    assert isinstance(run.collect_fishers()[0], dict)
    (tmp_path / "fisher").unlink()
    kept = run.collect_fishers()[0]
    assert isinstance(kept, Checkpoint)
    assert FisherStore(tmp_path / "fisher").load("f1") is None


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", ["fisher", "gradient_matching", "mats"])
def test_merge_and_tune_end_to_end(family, tmp_path, anchor):
    keys = family.recipe(anchor=anchor, cache=str(tmp_path / "cache"), calibration=30, engine="sobol")
    plain = bmm.merge(keys)
    average = bmm.merge(keys, anchor="average")
    moved = max(float((plain[n].float() - average[n].float()).abs().max()) for n in plain)
    assert 1e-3 < moved < 10
    result = bmm.tune(keys, budget=3, out=str(tmp_path / "r"))
    assert len(result.trials) == 3
    anchored = {s.task: s.value for s in result.validation["anchor"]}
    run = Run(Recipe.from_dict(keys))
    assert anchored == {s.task: s.value for s in run.score(plain)}
    path = bmm.merge(keys, out=tmp_path / "m")
    assert {s.task: s.value for s in bmm.evaluate(path, keys, split="validation")} == anchored


def test_mats_takes_fishers_only_where_asked(family, tmp_path):
    keys = family.recipe(anchor="mats", cache=str(tmp_path), calibration=20)
    plain = bmm.merge(keys)
    assert not (tmp_path / "fisher").exists()
    asked = bmm.merge(keys, fisher="sampled")
    assert len(stamps(tmp_path)) == len(TASKS)
    assert not torch.equal(plain["norm.weight"], asked["norm.weight"])
    assert torch.equal(plain["q.weight"], asked["q.weight"])


def test_task_weights_enter_the_fisher_merge(family, tmp_path):
    keys = family.recipe(anchor="fisher", cache=str(tmp_path), calibration=20)
    alone = bmm.merge(keys, weights={"stripe": 0.0, "corner": 0.0})
    expert = bmm.checkpoint.open_checkpoint(family.experts["ring"])
    for name in alone:
        torch.testing.assert_close(alone[name].float(), expert[name].float(), rtol=1e-5, atol=1e-6)
