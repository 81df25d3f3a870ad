"""``bmm merge --masks``, ``bmm reconstruct``, and task weights for forgetting and analogies, from flags to files."""

import json

import pytest
from bmm_cli.main import main
from safetensors.torch import load_file

import bmm
from bmm.errors import RecipeError
from tests.family import TASKS


def run(capsys, *args, code=0):
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in args])
    out = capsys.readouterr()
    assert done.value.code == code, out.err
    return out


@pytest.fixture
def flags(family):
    return [
        "--base",
        family.base,
        *(x for name, path in family.experts.items() for x in ("--expert", f"{name}={path}")),
    ]


@pytest.fixture
def weights(family):
    return {n: load_file(f"{family.folder}/{n}/model.safetensors") for n in ("base", *TASKS)}


@pytest.mark.parametrize("anchor", ["emr", "consensus_ta"])
def test_masks_bring_every_expert_nearly_back(anchor, family, flags, weights, tmp_path, capsys):
    run(capsys, "merge", *flags, "--anchor", anchor, "--masks", "-o", tmp_path / "m", "-q")
    assert {"model.safetensors", "masks.safetensors", "masks.json", "README.md", "bmm_recipe.yaml", "config.json"} == {
        p.name for p in (tmp_path / "m").iterdir()
    }
    done = run(capsys, "reconstruct", tmp_path / "m", "--task", "stripe", "-o", tmp_path / "s", "--json")
    assert json.loads(done.out) == {"checkpoint": str(tmp_path / "s"), "task": "stripe"}
    own, unified = (load_file(tmp_path / d / "model.safetensors") for d in ("s", "m"))
    off, off_unified = (
        sum(float((m[k] - weights["stripe"][k]).square().sum()) for k in own if k != "steps") for m in (own, unified)
    )
    assert off < off_unified / 2
    scores = {s.task: s.value for s in bmm.evaluate(tmp_path / "s", family.recipe())}
    merged = {s.task: s.value for s in bmm.evaluate(tmp_path / "m", family.recipe())}
    expert = {s.task: s.value for s in bmm.evaluate(family.experts["stripe"], family.recipe())}
    assert scores["stripe"] > expert["stripe"] - 0.1
    assert scores["stripe"] >= merged["stripe"]
    in_memory = bmm.reconstruct(tmp_path / "m", "stripe")
    assert all((in_memory[k] == own[k]).all() for k in own)


def test_mistakes_are_said(flags, family, tmp_path, capsys):
    out = tmp_path / "m"
    emr = ["merge", *flags, "--anchor", "emr", "--masks", "-o", out]
    assert "--masks goes with" in run(capsys, *emr, "--lam", 1, code=2).err
    assert "ties has no masks" in run(capsys, "merge", *flags, "--anchor", "ties", "--masks", "-o", out, code=2).err
    assert "scale has no say" in run(capsys, *emr, "--knob", "scale=0.5", code=2).err
    assert not out.exists()
    run(capsys, *emr, "-q")
    assert "not empty" in run(capsys, *emr, code=1).err
    run(capsys, *emr, "-q", "--overwrite")
    again = ["reconstruct", out, "-o", tmp_path / "x", "--task"]
    assert "did you mean ring" in run(capsys, *again, "rings", code=1).err
    assert "folder with the masks" in run(capsys, "reconstruct", out, "--task", "ring", "-o", out, code=1).err
    assert "so no masks" in run(capsys, "reconstruct", family.base, "--task", "ring", "-o", out, code=1).err
    with pytest.raises(RecipeError, match="plain merge that is written"):
        bmm.merge(family.recipe(), anchor="emr", masks=True)
    with pytest.raises(RecipeError, match="no dtype"):
        bmm.reconstruct(out, "ring", dtype="int8")


def test_a_negative_weight_forgets_and_an_analogy_adds_up(flags, weights, tmp_path, capsys):
    """Negation: W_0 - tau. Analogy, "stripe is to ring as the result is to corner": W_0 + b - a + c."""
    base, *_ = flags[1:2]
    forget = ["merge", "--base", base, *flags[2:4], "--anchor", "task_arithmetic", "--knob", "scale=1"]
    run(capsys, *forget, "--weights", "ring=-1", "-o", tmp_path / "forget", "-q")
    analogy = ["merge", *flags, "--anchor", "task_arithmetic", "--knob", "scale=1", "--weights", "ring=-1"]
    run(capsys, *analogy, "-o", tmp_path / "analogy", "-q")
    forgot, analogous = (load_file(tmp_path / d / "model.safetensors") for d in ("forget", "analogy"))
    start = weights["base"]
    tau = {t: {k: weights[t][k] - start[k] for k in start} for t in TASKS}
    for name in start:
        if start[name].is_floating_point():
            assert (forgot[name] - (start[name] - tau["ring"][name])).abs().max() < 1e-6
            expected = start[name] + tau["stripe"][name] - tau["ring"][name] + tau["corner"][name]
            assert (analogous[name] - expected).abs().max() < 1e-6


def test_forgetting_lowers_the_score_of_the_task(family, flags, tmp_path, capsys):
    run(capsys, "merge", *flags, "--anchor", "task_arithmetic", "--knob", "scale=0.3",
        "--weights", "ring=-1", "-o", tmp_path / "m", "-q")  # fmt: skip
    kept = {s.task: s.value for s in bmm.evaluate(tmp_path / "m", family.recipe())}
    base = {s.task: s.value for s in bmm.evaluate(family.base, family.recipe())}
    assert kept["ring"] < base["ring"]
    assert kept["stripe"] > base["stripe"]
