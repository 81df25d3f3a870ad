"""Grams behind merged blocks: order of execution, what runs where, caching, and RegMean++ as a method."""

import numpy as np
import pytest
import torch
from torch import nn

import bmm
from bmm import Task
from bmm.checkpoint import ModelPool
from bmm.errors import RecipeError
from bmm.grams import GramStore, reading_order
from bmm.recipe import Recipe
from bmm.records import Hyperparameters
from bmm.run import Run
from bmm.sequential import MergedInputs, block_of, steps_of


def test_blocks_by_name():
    assert block_of("encoder.layer.3.mlp.fc1.weight") == "encoder.layer.3"
    assert block_of("layer1.0.conv.weight") == "layer1.0"
    assert block_of("head.weight") == ""


def test_steps_in_order_of_execution():
    order = [("stem.weight",), ("b.1.q.weight", "b.1.k.weight"), ("b.0.q.weight",), ("x.weight", "y.weight"),
             ("b.1.o.weight",), ("stem.weight",)]  # fmt: skip
    assert steps_of(order) == [
        ("", ("stem.weight",)),
        ("b.1", ("b.1.q.weight", "b.1.k.weight", "b.1.o.weight")),
        ("b.0", ("b.0.q.weight",)),
        ("", ("x.weight", "y.weight")),
    ]


class Deep(nn.Module):
    """A stem, two blocks registered against their order of execution, and a head."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3, bias=False)
        self.blocks = nn.ModuleList(nn.ModuleDict({"b": nn.Linear(5, 4), "a": nn.Linear(4, 5)}) for _ in range(2))
        self.norm = nn.LayerNorm(4)
        self.stem = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in (self.blocks[1], self.blocks[0]):
            x = x + block["b"](torch.tanh(block["a"](x)))
        return self.head(self.norm(x))


def test_reading_order_is_that_of_execution():
    order = reading_order(Deep(), lambda m, x: m(x), torch.randn(3, 6), norms=True)
    assert [names[0] for names in order] == [
        "stem.weight", "blocks.1.a.weight", "blocks.1.b.weight", "blocks.0.a.weight", "blocks.0.b.weight",
        "norm.weight", "head.weight",
    ]  # fmt: skip
    assert ("norm.weight",) not in reading_order(Deep(), lambda m, x: m(x), torch.randn(3, 6))


@pytest.fixture
def problem(tmp_path):
    def states(seed, around=None, size=1.0):
        generator = torch.Generator().manual_seed(seed)
        shapes = Deep().state_dict()
        noise = {n: size * torch.randn(t.shape, generator=generator) for n, t in shapes.items()}
        return noise if around is None else {n: around[n] + noise[n] for n in noise}

    base = states(0, size=0.5)
    experts = [states(1 + t, base, 0.2) for t in range(3)]
    inputs = [torch.randn(30, 6, generator=torch.Generator().manual_seed(9 + t)) + t for t in range(3)]
    tasks = [Task(f"t{t}", validation=(x, torch.zeros(len(x)))) for t, x in enumerate(inputs)]
    pool = ModelPool(base, experts, task_names=[t.name for t in tasks])
    batches = [list(x.split(16)) for x in inputs]
    seen = []
    collector = MergedInputs(
        Deep(), pool, tasks, batches, GramStore(tmp_path), {}, "cpu", lambda *a: seen.append(a)
    )  # fmt: skip
    return collector, base, experts, inputs, seen


def run_block(tensors, block, x):
    """One block of `Deep` in NumPy: its output and the inputs of its two weights."""
    w = {n: t.double().numpy() for n, t in tensors.items()}
    hidden = np.tanh(x @ w[f"blocks.{block}.a.weight"].T + w[f"blocks.{block}.a.bias"])
    return x + hidden @ w[f"blocks.{block}.b.weight"].T + w[f"blocks.{block}.b.bias"], hidden


def regmean_of(inputs, weights, off_diagonal=1.0):
    grams = [x.T @ x / len(x) for x in inputs]
    grams = [off_diagonal * g + (1 - off_diagonal) * np.diag(np.diag(g)) for g in grams]
    return sum(w @ g for w, g in zip(weights, grams, strict=True)) @ np.linalg.pinv(sum(grams))


def test_regmean_pp_equals_a_float64_implementation_of_the_paper(problem):
    """Stem, block 1, block 0, head: inside a block the expert's weights, before it the merged model."""
    collector, base, experts, inputs, _ = problem
    grams = collector.behind_regmean({"off_diagonal": 0.9, "scale": 1.0}, [1.0] * 3)
    stacks = {n: [g.for_weight(n) for g in grams] for n in grams[0].key_of}
    merged = bmm.anchors.merge("regmean_pp", base, experts, grams=stacks)
    double = [{n: t.double().numpy() for n, t in e.items()} for e in experts]
    expected = {n: np.mean([e[n] for e in double], 0) for n in base}

    def solve(name, per_task):
        expected[name] = regmean_of(per_task, [e[name] for e in double], 0.9)

    xs = [x.double().numpy() for x in inputs]
    solve("stem.weight", xs)
    xs = [x @ expected["stem.weight"].T + expected["stem.bias"] for x in xs]
    for block in (1, 0):
        hidden = [run_block(e, block, x)[1] for e, x in zip(experts, xs, strict=True)]
        solve(f"blocks.{block}.a.weight", xs)
        solve(f"blocks.{block}.b.weight", hidden)
        tensors = {n: torch.from_numpy(v) for n, v in expected.items()}
        xs = [run_block(tensors, block, x)[0] for x in xs]
    centred = [x - x.mean(-1, keepdims=True) for x in xs]
    normal = [c / np.sqrt((c**2).mean(-1, keepdims=True) + 1e-5) for c in centred]
    solve("head.weight", [h * expected["norm.weight"] + expected["norm.bias"] for h in normal])
    for name in base:
        np.testing.assert_allclose(merged[name].numpy(), expected[name], rtol=2e-5, atol=2e-5, err_msg=name)
    assert set(stacks) == {n for n, t in base.items() if t.dim() == 2}


def test_the_first_step_has_the_experts_grams_and_later_ones_have_not(problem):
    collector, _, experts, inputs, seen = problem
    grams = collector.behind_regmean({"off_diagonal": 0.9, "scale": 1.0}, [1.0] * 3)
    steps = [detail for stage, _, _, detail in seen if stage == "grams"]
    assert steps == ["stem.weight", "blocks.1", "blocks.0", "head.weight", ""]
    net = Deep()
    for task, expert, x in zip(grams, experts, inputs, strict=True):
        net.load_state_dict(expert)
        own = bmm.grams.collect(net, lambda m, x: m(x), [x])
        torch.testing.assert_close(task.for_weight("stem.weight"), own.for_weight("stem.weight"))
        assert (task.for_weight("head.weight") - own.for_weight("head.weight")).norm() > 0.01
        assert task.key_of.keys() == own.key_of.keys()
        assert task.skipped == {}
        assert task.count == own.count


def test_one_task_of_identical_blocks_needs_no_correction(problem):
    """With one expert every merged block is the expert's, so its Grams are the ordinary ones."""
    collector, base, experts, inputs, _ = problem
    alone = MergedInputs(
        collector.model, ModelPool(base, experts[:1]), collector.tasks[:1], collector.batches[:1], collector.store, {},
        "cpu", collector.progress,
    )  # fmt: skip
    (grams,) = alone.behind_regmean({"off_diagonal": 1.0, "scale": 1.0}, [1.0])
    net = Deep()
    net.load_state_dict(experts[0])
    own = bmm.grams.collect(net, lambda m, x: m(x), [inputs[0]])
    for name in own.key_of:
        torch.testing.assert_close(grams.for_weight(name), own.for_weight(name), rtol=1e-4, atol=1e-4)


def test_bmm_behind_blocks_it_merged_itself(problem):
    """The head's inputs are those of the model merged at lam = 1, rho = 1 with the very Grams that came out."""
    collector, base, experts, inputs, _ = problem
    anchor = {n: torch.stack([e[n] for e in experts]).mean(0) for n in base}
    options = {"source": "data", "gamma": 0.5, "weights": [1.0, 2.0, 0.5], "normalise": "trace", "bias": "joined"}
    grams = collector.behind_bmm(anchor, options, norms=True)
    model = bmm.merging.prepare_model(collector.pool, anchor, grams, **options)
    merged = model.merge(Hyperparameters.uniform(model.groups, 1.0))
    assert not torch.equal(merged["norm.weight"], anchor["norm.weight"])
    net = Deep()
    net.load_state_dict(merged)
    for task, x in zip(grams, inputs, strict=True):
        own = bmm.grams.collect(net, lambda m, x: m(x), [x])
        torch.testing.assert_close(task.for_weight("head.weight"), own.for_weight("head.weight"), rtol=1e-4, atol=1e-5)


def test_models_that_name_parameters_otherwise(problem, tmp_path):
    """Checkpoints' names come out, whatever the model calls its parameters."""
    collector, base, experts, _, _ = problem
    knobs = {"off_diagonal": 0.9, "scale": 1.0}
    plain = collector.behind_regmean(knobs, [1.0] * 3)
    stored = [{f"enc.{n}": t for n, t in m.items()} for m in (base, *experts)]
    renamed = MergedInputs(
        collector.model, ModelPool(stored[0], stored[1:]), collector.tasks, collector.batches,
        GramStore(tmp_path / "other"), {f"enc.{n}": n for n in base}, "cpu", collector.progress,
    ).behind_regmean(knobs, [1.0] * 3)  # fmt: skip
    for one, two in zip(plain, renamed, strict=True):
        assert set(two.key_of) == {f"enc.{n}" for n in one.key_of}
        assert all(torch.equal(one.for_weight(n), two.for_weight(f"enc.{n}")) for n in one.key_of)


def test_the_cache_knows_what_the_grams_depend_on(problem):
    collector, _, _, _, seen = problem
    knobs = {"off_diagonal": 0.9, "scale": 1.0}

    def collected(**changes):
        seen.clear()
        collector.behind_regmean(knobs | changes.pop("knobs", {}), changes.pop("weights", [1.0] * 3))
        return bool(seen)

    assert collected()
    assert not collected()
    assert collected(knobs={"off_diagonal": 0.5})
    assert collected(weights=[1.0, 2.0, 1.0])
    assert not collected()
    collector.batches[2][0].add_(1.0)
    assert collected()


def test_regmean_pp_from_a_recipe(family, tmp_path):
    keys = family.recipe(anchor="regmean_pp", cache=str(tmp_path))
    plus, plain = bmm.merge(keys), bmm.merge(keys | {"anchor": "regmean"})
    assert plus["norm.weight"].equal(plain["norm.weight"])
    assert torch.allclose(plus["conv.weight"], plain["conv.weight"], atol=1e-5)
    assert not torch.allclose(plus["out.weight"], plain["out.weight"], atol=1e-4)
    path = bmm.merge(keys, out=tmp_path / "m", weights={"ring": 2.0})
    assert (path / "model.safetensors").exists()


def test_inputs_of_the_merged_model_from_a_recipe(family, tmp_path):
    keys = family.recipe(anchor="task_arithmetic", inputs="merged", norms="regression", cache=str(tmp_path))
    run = Run(Recipe.from_dict(keys))
    prepared = run.prepare()
    assert {s.weight for s in prepared.slots} == {f"{m}.weight" for m in ("conv", "q", "k", "fc1", "out", "norm")}
    other = Run(Recipe.from_dict(keys | {"inputs": "experts"})).prepare()
    point = Hyperparameters.uniform(prepared.groups, 1.0)
    assert not torch.allclose(prepared.merge(point)["out.weight"], other.merge(point)["out.weight"], atol=1e-4)
    assert list(bmm.collect_grams(keys)) == list(family.experts)
    again = Run(Recipe.from_dict(keys)).prepare().merge(point)
    assert all(torch.equal(again[n], t) for n, t in prepared.merge(point).items())


def test_merged_inputs_need_data():
    with pytest.raises(RecipeError, match="needs calibration inputs"):
        Recipe.from_dict({"inputs": "merged", "grams": "datafree"})
