"""Sampling a study's posterior: the noise, the choice of its size, the four models, the command."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bmm_cli.main import main
from safetensors.torch import load_file, save_file

import bmm
from bmm.anchors.anchor import named_generator
from bmm.errors import RecipeError, StudyError
from bmm.functions import load_function
from bmm.merging import PreparedModel, Slot
from bmm.posterior import GRID, REFINEMENTS, Judge, Sampler, choose_sigma
from bmm.recipe import Recipe
from bmm.records import Calibration, Hyperparameters
from bmm.report import calibration_report
from bmm.run import Run
from bmm.solver import prepare
from tests.family import TASKS

ANCHOR = {"anchor": "task_arithmetic", "knobs": {"scale": 1.5}}  # too far out, so too sure of itself


@pytest.fixture(scope="module")
def study(family, tmp_path_factory):
    out = tmp_path_factory.mktemp("posterior") / "run"
    return bmm.tune(family.recipe(), engine="sobol", budget=2, out=str(out), **ANCHOR)


@pytest.fixture(scope="module")
def folder(study):
    return Path(study.paths["study"]).parent


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "c.json"
    return bmm.calibrate(folder, samples=3, out=out), out


# -- noise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [3, 7])
def test_noise_has_the_covariance_of_the_posterior(rank):
    """20 000 rows of one module with its bias, in float64, against sigma^2 (G + lam I)^-1."""
    rows, width = 20_000, 7
    g = torch.Generator().manual_seed(rank)
    x = torch.randn(50, rank, generator=g, dtype=torch.float64) @ torch.randn(
        rank, width, generator=g, dtype=torch.float64
    )
    gram = x.T @ x / 50
    w0 = torch.zeros(rows, width, dtype=torch.float64)
    module = prepare(w0, [w0 + 1], [gram], w0 + 0.5, normalise="none")
    slot = Slot("m.weight", "m.bias", "linear", "g", module)
    model = PreparedModel((slot,), {}, {"m.weight": (rows, width - 1), "m.bias": (rows,)})
    lam, rho, sigma = 0.3, 1.4, 0.2
    point = Hyperparameters({"g": lam}, {"g": rho})
    draw, mean = model.sample(point, sigma, g), model.merge(point)
    noise = torch.cat([draw["m.weight"] - mean["m.weight"], (draw["m.bias"] - mean["m.bias"]).unsqueeze(1)], 1)
    expected = (rho * sigma) ** 2 * torch.linalg.inv(gram + lam * torch.eye(width, dtype=torch.float64))
    covariance = noise.T @ noise / rows
    # entry (i, j) of a Wishart mean deviates by sqrt((C_ii C_jj + C_ij^2) / rows)
    d = expected.diagonal()
    deviation = ((torch.outer(d, d) + expected.square()) / rows).sqrt()
    assert float(((covariance - expected) / deviation).abs().max()) < 4.5
    assert torch.equal(model.sample(point, 0.0, g)["m.weight"], mean["m.weight"])
    assert torch.equal(model.sample(point, 0.0, g)["m.bias"], mean["m.bias"])


def test_no_noise_is_the_tuned_merge_bit_for_bit(study, family):
    run = Run(Recipe.from_dict(family.recipe(**ANCHOR)))
    prepared = run.prepare()
    silent = prepared.sample(study.hyperparameters, 0.0, torch.Generator())
    written = load_file(Path(study.paths["checkpoint"]) / "model.safetensors")
    assert silent.keys() == written.keys()
    assert all(torch.equal(silent[n], written[n]) for n in written)


def test_draws_where_weights_were_searched_decompose_once(family):
    run = Run(Recipe.from_dict(family.recipe(anchor="task_arithmetic", search=["weights", "gamma"])))
    prepared = run.prepare()
    point = replace(Hyperparameters.uniform(prepared.groups, 0.5), gamma=0.2, weights={TASKS[0]: 2.0})
    fixed = prepared.fixed(point)
    assert all(slot.evidence is None for slot in fixed.slots)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    slow, fast = (m.sample(point, 0.1, g) for m, g in zip((prepared, fixed), generators, strict=True))
    assert all(torch.equal(slow[n], fast[n]) for n in slow)
    with pytest.raises(RecipeError, match="not prepared"):
        fixed.merge(replace(point, gamma=0.3))
    assert prepared.fixed(Hyperparameters.uniform(prepared.groups, 0.5)) is prepared


# -- sigma ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [0.004, 0.05, 1.1])
def test_the_best_sigma_is_found_between_the_points_of_the_grid(best):
    def nll(sigma):  # a well of a decade on the way up from 1 to 4
        step = math.log10(sigma / best)
        return 1 - 0.1 * math.exp(-4 * step**2) + 3 / (1 + math.exp(-20 * (step - 0.7)))

    sigma, tried = choose_sigma(nll, unit=0.05, at_zero=1.0)
    assert sigma == pytest.approx(best, rel=0.1)
    assert len(tried) <= 1 + len(GRID) + REFINEMENTS
    assert tried == sorted(tried)
    assert tried[0] == (0.0, 1.0)


def test_noise_that_does_not_help_is_left_out():
    asked = []
    sigma, tried = choose_sigma(lambda s: asked.append(s) or 1 + s, unit=1.0, at_zero=1.0)
    assert sigma == 0
    assert max(asked) <= 10**0.5  # beyond twice the NLL of no noise nothing is tried
    assert len(tried) == 1 + len(asked) <= 1 + len(GRID)
    assert choose_sigma(lambda s: 1 / 0, unit=0.0, at_zero=1.0) == (0.0, [(0.0, 1.0)])
    sigma, tried = choose_sigma(lambda s: math.nan if s > 0.5 else 1 - s, unit=1.0, at_zero=1.0)
    assert 0.1 < sigma <= 0.5
    assert all(math.isfinite(value) for _, value in tried)


# -- the whole -----------------------------------------------------------------------------------------------------


def test_four_models_on_both_splits(found, study):
    result, out = found
    assert len(result.rows) == 4 * 2 * len(TASKS)
    for split, tuned in (("validation", study.validation), ("test", study.test)):
        for model, name in (("mean", "best"), ("temperature", "best"), ("experts", "experts")):
            rows = result.of(model, split)
            assert [(r.task, r.n) for r in rows] == [(s.task, s.n) for s in tuned[name]]
            assert [r.accuracy for r in rows] == pytest.approx([s.value for s in tuned[name]], abs=1e-6)
    mean, heat = result.of("mean", "validation"), result.of("temperature", "validation")
    assert all(b.nll <= a.nll for a, b in zip(mean, heat, strict=True))
    assert result.mean("ensemble", "validation").nll == pytest.approx(min(v for _, v in result.search))
    assert result.mean("ensemble", "validation").nll <= result.mean("mean", "validation").nll
    assert result.search[0] == (0.0, pytest.approx(result.mean("mean", "validation").nll))
    assert Calibration.from_json(json.loads(out.read_text())) == result


def test_an_ensemble_is_the_mean_softmax_of_its_draws(found, study, family):
    result, _ = found
    run = Run(Recipe.from_dict(family.recipe(**ANCHOR)))
    prepared, task = run.prepare(), run.tasks[1]
    x, y = task.test
    odds = torch.zeros(len(y), 4, dtype=torch.float64)
    for number in range(3):
        draw = prepared.sample(study.hyperparameters, result.sigma, named_generator("posterior", 0, number))
        net = load_function(f"{family.file}:model", "m")()
        net.load_state_dict(draw)
        with torch.inference_mode():
            odds += task.forward(net, x).double().softmax(-1) / 3
    row = result.of("ensemble", "test")[1]
    assert result.sigma > 0
    assert row.accuracy == float((odds.argmax(1) == y).double().mean())
    assert row.nll == pytest.approx(-float(odds[torch.arange(len(y)), y].log().mean()), rel=1e-5)
    assert row.nll != result.of("mean", "test")[1].nll


def test_the_seed_decides(found, folder):
    result, _ = found
    assert bmm.calibrate(folder, samples=3) == result
    other = bmm.calibrate(folder, samples=3, seed=1)
    assert other.of("mean", "test") == result.of("mean", "test")
    assert other.of("ensemble", "test") != result.of("ensemble", "test")


def test_a_study_without_labels_is_calibrated_with_them_where_they_are(family, tmp_path):
    keys = family.recipe(score_by="agreement", anchor="average", engine="sobol", budget=2, out=str(tmp_path / "r"))
    bmm.tune(keys)
    result = bmm.calibrate(tmp_path / "r", samples=1)
    assert 0.5 < result.mean("experts", "validation").accuracy < 1


def test_the_anchor_itself_has_no_spread(found, family):
    run = Run(Recipe.from_dict(family.recipe(**ANCHOR)))
    prepared = run.prepare()
    sampler = Sampler(run, prepared, Hyperparameters.uniform(prepared.groups, math.inf), 2, 0)
    assert sampler.unit == 0
    judge = Judge(run, "validation")
    mean, drawn = judge.log_probabilities(sampler.mean), sampler.ensemble(1.0, judge)
    assert all(torch.allclose(mean[t], drawn[t], atol=1e-12) for t in TASKS)
    assert "the ensemble is the mean" in calibration_report(replace(found[0], sigma=0.0))


def test_what_cannot_be_calibrated_is_refused_by_name(study, folder, family, tmp_path):
    tasks = load_function(f"{family.file}:tasks", "t")()

    def refused(message, hint, **change):
        with pytest.raises(RecipeError, match=message) as error:
            bmm.calibrate(folder, samples=1, tasks=[*tasks[:2], replace(tasks[2], **change)])
        assert hint in error.value.hint

    x, y = tasks[2].validation
    refused("task 'corner' has a score of its own", "Task without score", score=lambda out, t: (out.argmax(1) == t) * 1)
    refused("validation data of task 'corner' have no labels", "targets", validation=x)
    refused("validation targets of task 'corner' are no class labels", "whole numbers", validation=(x, y.float()))
    refused("task 'corner' has labels 5 to 8, its forward logits of 4 classes", "0 to", validation=(x, y + 5))
    refused("task 'corner' has no class probabilities", "logits", forward=lambda m, x: m(x)[:, 0])
    for keys, message in (
        ({"samples": 0}, "0 samples"), ({"seed": -1}, "seed -1"), ({"anchor": "ties"}, "anchor cannot change"),
        ({"out": tmp_path}, "cannot write"), ({"out": tmp_path / "no" / "c.json"}, "cannot write"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=message):
            bmm.calibrate(folder, **keys)


def test_only_finished_studies_of_the_same_checkpoints(study, family, tmp_path):
    import shutil

    with pytest.raises(StudyError, match="no study"):
        bmm.calibrate(tmp_path)
    models = tmp_path / "models"
    shutil.copytree(family.folder, models)
    keys = family.recipe(engine="sobol", experts={t: str(models / t) for t in TASKS}, budget=2)
    bmm.tune(keys, out=str(tmp_path / "r"))
    file = models / TASKS[0] / "model.safetensors"
    tensors = load_file(file)
    tensors["q.weight"] += 0.01
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(StudyError, match="have changed"):
        bmm.calibrate(tmp_path / "r")
    (tmp_path / "r" / "result.json").unlink()
    with pytest.raises(StudyError, match="not finished") as error:
        bmm.calibrate(tmp_path / "r")
    assert "--resume" in error.value.hint


def test_the_command(found, folder, tmp_path, capsys, monkeypatch):
    def command(*args):
        with pytest.raises(SystemExit) as end:
            main(["calibrate", str(folder), *args])
        return end.value.code, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    result, _ = found
    code, out, err = command("--samples", "3", "--out", "c.json")
    assert code == 0
    assert out == calibration_report(result)
    assert "searching sigma" in err
    assert Calibration.from_json(json.loads((tmp_path / "c.json").read_text())) == result
    for line in (
        "## Validation (3 tasks, n = 480)",
        "## Test (3 tasks, n = 1200)",
        "ensemble of 3",
        "temperatures: ring",
    ):
        assert line in out
    assert json.loads(command("--samples", "3", "--json", "--quiet")[1]) == json.loads(json.dumps(result.to_json()))
    code, out, err = command("--samples", "0")
    assert (code, out) == (2, "")
    assert "error: 0 samples" in err
