"""From checkpoints to aligned checkpoints: Python, command line, barriers, and the merge that follows."""

import json

import numpy as np
import pytest
import torch
from bmm_cli.main import main
from safetensors.torch import load_file, save_file
from torch import nn

import bmm
from bmm.errors import RecipeError, WriteError
from bmm.rebasin import Barrier, Permutation, measure_barrier, recompute_batchnorm, trace_spec
from tests.rebasin.networks import ResNet, mlp, randomise, state, task

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def save(model, folder, config=None):
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in state(model).items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "test"}))
    return folder


def squared(outputs, targets):
    return (outputs - targets).square().mean(-1)


@pytest.fixture
def pair(tmp_path):
    """A reference and the same network with its units shuffled and a little noise."""
    reference = randomise(mlp())
    first = save(reference, tmp_path / "a")
    spec = trace_spec(reference, [lambda m: m(X[:2])])
    noise = torch.Generator().manual_seed(1)
    shuffled = Permutation.random(spec, 1).apply(state(reference))
    other = mlp()
    other.load_state_dict({k: v + 0.01 * torch.randn(v.shape, generator=noise) for k, v in shuffled.items()})
    return first, save(other, tmp_path / "b")


def test_align_undoes_a_shuffle_keeps_the_function_and_writes(pair, tmp_path):
    a, b = pair
    with torch.no_grad():
        outputs_of_a = randomise(mlp())(X)
    copy_a = bmm.Task("t", validation=(X, outputs_of_a), score=lambda y, target: -squared(y, target))
    found = bmm.align(a, [b], tasks=[copy_a], model=mlp, out=tmp_path / "out", points=5, loss=squared)
    written = load_file(tmp_path / "out" / "b" / "model.safetensors")
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    for name in first:
        assert (written[name] - first[name]).abs().max() < 0.06, name
        assert torch.equal(written[name], found.tensors("b")[name])
        assert torch.equal(written[name].flatten().sort().values, second[name].flatten().sort().values)
    outputs = []
    for tensors in (second, written):
        model = mlp().eval()
        model.load_state_dict(tensors)
        outputs.append(model(X))
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-6)
    (before, after), barriers = found.matching.similarity[0], found.barriers["b"]
    assert before < 0.5 < 0.99 < after
    assert set(barriers) == {"before", "after"}
    assert barriers["after"].loss < 0.05 * barriers["before"].loss
    assert barriers["after"].score == pytest.approx(barriers["after"].loss)
    for end in (0, -1):
        assert barriers["after"].losses[end] == pytest.approx(barriers["before"].losses[end], rel=1e-4, abs=1e-9)
    card = (tmp_path / "out" / "b" / "README.md").read_text()
    assert "2209.04836" in card
    assert json.loads(json.dumps(found.to_json()))["experts"]["b"]["checkpoint"] == str(tmp_path / "out" / "b")


def test_one_reference_several_experts_and_their_mean(pair, tmp_path):
    a, b = pair
    c = tmp_path / "c.safetensors"
    spec = trace_spec(randomise(mlp()), [lambda m: m(X[:2])])
    save_file(Permutation.random(spec, 9).apply(load_file(b / "model.safetensors")), c)
    found = bmm.align(a, {"one": b, "two": c}, spec=spec, to="mean")
    one, two = found.tensors("one"), found.tensors("two")
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert found.barriers == {}
    assert found.paths == {}


def test_batchnorm_is_reported_with_and_without_new_statistics(tmp_path):
    images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    a, b = save(randomise(ResNet()), tmp_path / "a"), save(randomise(ResNet(), 1), tmp_path / "b")
    found = bmm.align(a, [b], tasks=[task(images, randomise(ResNet()))], model=ResNet, points=3).barriers["b"]
    kinds = [f"{k}{s}" for s in ("", ", statistics recomputed") for k in ("before", "after")]
    assert list(found) == kinds
    assert found["after"].losses[1] != found["after, statistics recomputed"].losses[1]
    assert found["after"].losses[::2] == found["after, statistics recomputed"].losses[::2]
    notices = []
    blind = task(images, randomise(ResNet()))
    blind = bmm.Task("t", validation=blind.validation)
    bmm.align(a, [b], tasks=[blind], model=ResNet, points=3, progress=lambda *x: notices.append(x))
    assert any(stage == "notice" and "calibration" in text for stage, _, _, text in (n for n in notices if len(n) == 4))


def test_barrier_by_hand():
    barrier = Barrier((0.0, 0.25, 1.0), (0.8, 0.5, 0.4), (1.0, 2.0, 3.0))
    assert barrier.score == pytest.approx(0.7 - 0.5)
    assert barrier.loss == pytest.approx(2.0 - 1.5)
    assert Barrier((0.0, 0.5, 1.0), (0.5, 0.9, 0.5), None).score == 0
    assert Barrier((0.0, 0.5, 1.0), (0.5, 0.9, 0.5), None).loss is None


def test_barrier_agrees_with_numpy_on_a_linear_model():
    model = nn.Linear(3, 2, bias=False)
    g = torch.Generator().manual_seed(0)
    a, b, x = torch.randn(2, 3, generator=g), torch.randn(2, 3, generator=g), torch.randn(50, 3, generator=g)
    one = bmm.Task("t", validation=(x, (x[:, 0] > 0).long()))
    found = measure_barrier(model, {"weight": a}, {"weight": b}, [one], points=7)
    labels = (x[:, 0] > 0).long().numpy()
    for alpha, loss, score in zip(found.alphas, found.losses, found.scores, strict=True):
        logits = x.double().numpy() @ ((1 - alpha) * a + alpha * b).double().numpy().T
        p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        assert loss == pytest.approx(-p[np.arange(50), labels].mean(), rel=1e-5)
        assert score == pytest.approx((logits.argmax(1) == labels).mean())
    other = measure_barrier(
        model, {"weight": a}, {"weight": b}, [one], points=3, loss=lambda out, y: (out[:, 0] - y.float()) ** 2
    )
    expected = [float(((x @ w.T)[:, 0] - (x[:, 0] > 0).float()).square().mean()) for w in (a, (a + b) / 2, b)]
    assert other.losses == pytest.approx(expected, rel=1e-5)
    with pytest.raises(RecipeError, match="points"):
        measure_barrier(model, {"weight": a}, {"weight": b}, [one], points=2)


def test_statistics_are_those_of_the_calibration_inputs_and_nothing_else_changes():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.9), nn.Linear(5, 4)).eval()
    given = randomise(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.9), nn.Linear(5, 4))).state_dict()
    kept = {n: t.clone() for n, t in given.items()}
    one = bmm.Task("t", validation=(X, torch.zeros(40).long()), calibration=X, batch_size=20)
    found = recompute_batchnorm(model, given, [one])
    h = (X @ given["0.weight"].T + given["0.bias"]).double().numpy()
    means, variances = ([f(h[s : s + 20]) for s in (0, 20)] for f in (lambda v: v.mean(0), lambda v: v.var(0, ddof=1)))
    np.testing.assert_allclose(found["1.running_mean"], np.mean(means, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["1.running_var"], np.mean(variances, 0), rtol=1e-5)
    assert all(torch.equal(given[n], kept[n]) for n in kept)
    assert all(torch.equal(found[n], kept[n]) for n in kept if "running" not in n and "tracked" not in n)
    assert model[1].momentum == 0.1
    assert not model[1].training


def test_input_is_refused_before_the_matching(pair, tmp_path):
    a, b = pair
    (tmp_path / "out" / "b").mkdir(parents=True)
    (tmp_path / "out" / "b" / "notes.txt").write_text("mine")
    spec = trace_spec(randomise(mlp()), [lambda m: m(X[:2])])
    with pytest.raises(WriteError, match="not empty"):
        bmm.align(a, [b], spec=spec, out=tmp_path / "out")
    with pytest.raises(WriteError, match="overlaps"):
        bmm.align(a, [b], spec=spec, out=tmp_path, overwrite=True)
    with pytest.raises(RecipeError, match="nothing to permute"):
        bmm.align(a, [b])
    with pytest.raises(RecipeError, match="residual"):
        bmm.align(a, [b], residual=True)
    with pytest.raises(RecipeError, match="within") as caught:
        bmm.align(a, [b], withn="vo")
    assert "withn" in caught.value.message
    with pytest.raises(RecipeError, match="same file name"):
        bmm.align(a, [b, tmp_path / "x" / "b"])


SOURCE = """
import torch
import bmm
from torch import nn
from safetensors.torch import load_file
from pathlib import Path

def model():
    return nn.Sequential(
        nn.Linear(6, 11), nn.ReLU(), nn.Linear(11, 9), nn.LayerNorm(9), nn.GELU(), nn.Dropout(0.5), nn.Linear(9, 4))

def tasks():
    d = load_file(Path(__file__).parent / "data.safetensors")
    return [bmm.Task("t", validation=(d["x"], d["y"]))]
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The command line in this process: what it printed, once its exit code is right."""
    monkeypatch.chdir(tmp_path)

    def call(*args, code=0):
        with pytest.raises(SystemExit) as ended:
            main(list(args))
        assert ended.value.code == code
        return capsys.readouterr()

    return call


def test_commands_of_the_page_align_and_merge(pair, run, tmp_path):
    """What docs/rebasin.md shows: align, then an average in which the reference is base and expert."""
    (tmp_path / "net.py").write_text(SOURCE)
    save_file({"x": X, "y": task(X, randomise(mlp())).validation[1]}, tmp_path / "data.safetensors")
    flags = ["--model", "net.py:model", "--tasks", "net.py:tasks", "--points", "3"]
    shown = run("align", "a", "b", *flags, "--show-spec").out
    (tmp_path / "spec.yaml").write_text(shown)
    text = run("align", "a", "b", *flags, "--out", "aligned")
    for word in ("b", "before", "after", "loss barrier", "2 groups", "aligned/b"):
        assert word in text.out
    again = run("align", "a", "two=b", "--spec", "spec.yaml", "-o", "again", "--json", "-q")
    assert again.err == ""
    data = json.loads(again.out)
    assert data["groups"] == {"0": 11, "2": 9}
    assert data["objective"] == sorted(data["objective"])
    written = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("aligned/b", "again/two")]
    assert written[0] == written[1]
    run("merge", "--base", "a", "--expert", "a", "--expert", "aligned/b", "--anchor", "average", "-o", "m")
    merged, a, b = (load_file(tmp_path / d / "model.safetensors") for d in ("m", "a", "aligned/b"))
    for name in a:
        torch.testing.assert_close(merged[name], (a[name] + b[name]) / 2)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["a", "b"], 2, ["nothing to do"]),
        (["a"], 2, ["EXPERT"]),
        (["a", "b", "-o", "out"], 2, ["nothing to permute", "docs/rebasin.md"]),
        (["a", "b", "-o", "out", "--spec", "no.yaml"], 2, ["no.yaml"]),
        (["a", "x=b", "x=a", "-o", "out"], 2, ["NAME=PATH"]),
        (["a", "b", "-o", "out", "--to", "mid"], 2, ["mean"]),
    ],
)
def test_mistakes_are_one_line_and_a_hint(pair, run, args, code, words, tmp_path):
    done = run("align", *args, code=code)
    assert done.out == ""
    for word in words:
        assert word in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_checkpoints_of_transformers_need_no_model(kind, residual, tmp_path):
    """Names, ties, Conv1D and the residual stream of real classes, through save_pretrained and back."""
    transformers = pytest.importorskip("transformers")
    if kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=32, tie_word_embeddings=True,
        )  # fmt: skip
        build = transformers.LlamaForCausalLM
    else:
        config = transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0
        )
        build = transformers.GPT2LMHeadModel
    tokens = torch.randint(32, (6, 7), generator=torch.Generator().manual_seed(0))
    models = {}
    for seed, name in enumerate("ab"):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            models[name] = build(config).eval()
        models[name].save_pretrained(tmp_path / name)
    last = bmm.Task(
        "t", validation=({"input_ids": tokens}, tokens[:, 0]), forward=lambda model, batch: model(**batch).logits[:, -1]
    )
    found = bmm.align(
        tmp_path / "a", [tmp_path / "b"], tasks=[last], residual=residual, within="vo", points=3, out=tmp_path / "o"
    )
    assert len(found.spec.groups) == 4 + residual
    assert found.spec.notices == ()
    aligned = build.from_pretrained(tmp_path / "o" / "b").eval()
    with torch.no_grad():
        torch.testing.assert_close(aligned(tokens).logits, models["b"](tokens).logits, atol=1e-6, rtol=1e-6)
    embedding = aligned.get_input_embeddings().weight
    assert torch.equal(embedding, models["b"].get_input_embeddings().weight) != residual
    assert aligned.get_output_embeddings().weight is embedding
