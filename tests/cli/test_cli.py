"""The command line through real subprocesses: output, exit codes, one-line errors, interruption."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from bmm_cli.main import COMMANDS
from safetensors.torch import load_file

from tests.family import TASKS

BMM = [sys.executable, "-c", "from bmm_cli.main import main; main()"]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def bmm(*args, code=0, **options):
    done = subprocess.run([*BMM, *map(str, args)], capture_output=True, text=True, env=ENV, timeout=240, **options)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def recipe(family, tmp_path_factory):
    return family.yaml(tmp_path_factory.mktemp("recipe") / "r.yaml", engine="sobol", anchor="task_arithmetic")


@pytest.fixture(scope="module")
def study(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    return out, bmm("tune", "--recipe", recipe, "--budget", 5, "--out", out)


def test_help_of_every_command_has_examples():
    top = bmm("--help").stdout
    for name in COMMANDS:
        assert name in top
        text = bmm(name, "--help").stdout
        assert f"bmm {name}" in text.split("Options:")[0].split("\n", 2)[2]


def test_every_recipe_key_is_a_flag():
    from dataclasses import fields

    from bmm.recipe import Recipe

    text = bmm("tune", "--help").stdout
    for field in fields(Recipe):
        assert "--" + field.name.replace("_", "-") in text


def test_tune_prints_lines_the_table_and_the_files(study):
    out, done = study
    assert "trial 1/5 anchor" in done.stderr
    assert "trial 5/5" in done.stderr
    assert "s left" in done.stderr
    assert "\x1b[" not in done.stderr + done.stdout
    for word in (*TASKS, "experts", "gap closed on test", str(out / "model")):
        assert word in done.stdout
    for name in ("study.db", "result.json", "report.md", "model/README.md", "model/bmm_recipe.yaml"):
        assert (out / name).exists()


def test_json_and_quiet(recipe, tmp_path):
    done = bmm("tune", "--recipe", recipe, "--budget", 3, "-o", tmp_path / "r", "--json", "--quiet")
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert len(result["trials"]) == 3
    assert result["trials"][0]["hyperparameters"]["lam"]["q"] == "inf"


def test_report_text_json_and_trials(study):
    out, done = study
    assert bmm("report", out).stdout == done.stdout
    assert json.loads(bmm("report", out, "--json").stdout) == json.loads((out / "result.json").read_text())
    assert bmm("report", out, "--trials").stdout.count("completed |") == 5


def test_evaluate_agrees_with_the_study(study, recipe):
    out, _ = study
    scores = json.loads(bmm("evaluate", out / "model", "--recipe", recipe, "--json").stdout)
    best = json.loads((out / "result.json").read_text())["test"]["best"]
    assert [s["value"] for s in scores["scores"]] == [s["value"] for s in best]


def test_merge_plain_bmm_and_from_a_study(study, recipe, tmp_path):
    out, _ = study
    bmm("merge", "--recipe", recipe, "--anchor", "ties", "--knob", "density=0.5", "-o", tmp_path / "plain")
    bmm("merge", "--recipe", recipe, "--lam", 1, "-o", tmp_path / "bmm")
    bmm("merge", "--study", out, "-o", tmp_path / "best")
    bmm("merge", "--study", out, "--trial", 1, "-o", tmp_path / "one")
    weights = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("plain", "bmm", "best", "one")]
    assert weights[2] == (out / "model" / "model.safetensors").read_bytes()
    ours, trial = (load_file(tmp_path / d / "model.safetensors") for d in ("bmm", "one"))  # solved in two ways
    assert all(torch.allclose(ours[n], trial[n], atol=1e-6) for n in trial)
    assert weights[0] != weights[1]


def test_goals_fronts_and_saving_on_the_command_line(recipe, tmp_path):
    out, (one, two, three) = tmp_path / "run", TASKS
    flags = ["--goal", "worst", "--floor", "0.1", "--floor", f"{one}=0.2", "--objectives", f"{one},rest={two}+{three}"]
    bmm("tune", "--recipe", recipe, "--grams", "datafree", "--budget", 4, "-o", out, "-q", *flags)
    done = json.loads(bmm("report", out, "--pareto", tmp_path / "front.html", "--json").stdout)
    assert done["goal"]["floor"] == {one: 0.2, two: 0.1, three: 0.1}
    assert done["goal"]["objectives"] == [[one, [one]], ["rest", [two, three]]]
    assert "plotly" in (tmp_path / "front.html").read_text()
    number = done["trials"][-1]["number"]
    bmm("save", out, "--trial", number, "-o", tmp_path / "saved", "-q")
    bmm("merge", "--study", out, "--trial", number, "-o", tmp_path / "merged", "-q")
    saved, merged = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("saved", "merged"))
    assert saved == merged
    assert "ends in .html" in bmm("report", out, "--pareto", tmp_path / "front.pdf", code=2).stderr


def test_experts_on_the_command_line(family, tmp_path):
    flags = [x for name, path in family.experts.items() for x in ("--expert", f"{name}={path}")]
    done = bmm("merge", "--base", family.base, *flags, "--anchor", "average", "-o", tmp_path / "m")
    assert "merging" in done.stderr
    assert (tmp_path / "m" / "config.json").exists()


def test_gram_inspect_and_anchors(family, recipe, tmp_path):
    text = bmm("gram", "--recipe", recipe, "--cache", tmp_path).stdout
    assert all(task in text for task in TASKS)
    data = json.loads(bmm("inspect", family.base, *family.experts.values(), "--groups", "role", "--json").stdout)
    assert data["agree"]
    assert {g["group"] for g in data["groups"]} == {"conv", "q", "k", "fc1", "out"}
    listed = json.loads(bmm("anchors", "--json").stdout)
    assert {"tsv", "ties", "regmean", "wudi_exact"} <= {a["name"] for a in listed}
    assert "density" in bmm("anchors", "ties").stdout


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["tuen"], 2, ["did you mean tune"]),
        (["tune", "--budgt", "3"], 2, ["--budget"]),
        (["tune", "--anchor", "tvs"], 1, ["tvs", "tsv"]),
        (["tune", "--anchor", "tsv", "--knob", "scal=1"], 1, ["scal", "scale"]),
        (["tune", "--budget", "1"], 2, ["at least 2"]),
        (["tune", "--grams", "dat"], 2, ["data"]),
        (["tune", "--floor", "high"], 2, ["floor"]),
        (["tune", "--floor", "2"], 2, ["(0, 1.5]"]),
        (["tune", "--objectives", "mnist"], 2, ["one objective"]),
        (["tune", "--objective", "agreement"], 2, ["--objective is --score-by now"]),
        (
            ["merge", "-o", "x", "--base", "b", "--expert", "p/a", "--expert", "q/a"],
            2,
            ["'a' is given twice", "p/a", "q/a"],
        ),
        (["merge", "-o", "x", "--weights", "mnist=much"], 2, ["a number expected"]),
        (["tune", "--objectives", "mnist,lattin"], 2, ["did you mean latin"]),
        (["tune", "--recipe", "/no/such.yaml"], 2, ["/no/such.yaml"]),
        (["tune", "--resume", "/no/such"], 1, ["no study", "hint"]),
        (["tune", "--resume", "x", "--anchor", "tsv"], 2, ["--anchor cannot change"]),
        (["tune", "--zoo", "vit9"], 2, ["vit8"]),
        (["tune", "--device", "cuda"], 2, ["CUDA"]),
        (["merge", "--anchor", "ties"], 2, ["--out"]),
        (["merge", "-o", "x", "--trial", "3"], 2, ["--study"]),
        (["evaluate", "/no/such/model"], 1, ["/no/such/model"]),
        (["inspect", "/no/such"], 1, ["/no/such"]),
        (["anchors", "teis"], 1, ["ties"]),
        (["report", "/no/such"], 1, ["no study"]),
        (["save", "/no/such", "-o", "x"], 1, ["no study"]),
    ],
)
def test_mistakes_are_one_line_and_a_hint(args, code, words, tmp_path):
    done = subprocess.run([*BMM, *args], capture_output=True, text=True, env=ENV, cwd=tmp_path, timeout=120)
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 5
    for word in words:
        assert word in done.stderr
    assert list(tmp_path.iterdir()) == []
    if code == 2:
        assert done.returncode == 2


def test_debug_shows_the_traceback(tmp_path):
    done = subprocess.run(
        [*BMM, "evaluate", "/no/such/model", "--debug"], capture_output=True, text=True, env=ENV, timeout=120
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def started(recipe, out, budget):
    command = [*BMM, "tune", "--recipe", str(recipe), "--budget", str(budget), "--out", str(out)]
    # A shell that runs the tests in the background has them ignore SIGINT; the command must not inherit that.
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for_trials(process, count):
    for line in process.stderr:
        if line.startswith(f"trial {count}/"):
            return
    raise AssertionError("the study ended before it was interrupted")


def test_ctrl_c_leaves_a_study_that_resumes_to_the_same_rows(recipe, tmp_path):
    process = started(recipe, tmp_path / "cut", 4000)
    wait_for_trials(process, 6)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"bmm tune --resume {tmp_path / 'cut'}" in errors
    assert "Traceback" not in errors
    found = json.loads(bmm("report", tmp_path / "cut", "--json").stdout)
    count = len(found["trials"]) + 3
    bmm("tune", "--resume", tmp_path / "cut", "--budget", count)
    bmm("tune", "--recipe", recipe, "--budget", count, "--out", tmp_path / "whole")
    rows = [json.loads((tmp_path / d / "result.json").read_text())["trials"] for d in ("cut", "whole")]
    keys = ("number", "kind", "status", "hyperparameters", "scores", "objective")
    assert [[t[k] for k in keys] for t in rows[0]] == [[t[k] for k in keys] for t in rows[1]]


def test_two_processes_on_one_study_are_refused(recipe, tmp_path):
    process = started(recipe, tmp_path / "busy", 100000)
    try:
        wait_for_trials(process, 2)
        done = bmm("tune", "--resume", tmp_path / "busy", code=1)
        assert str(process.pid) in done.stderr
        assert "trial" in bmm("report", tmp_path / "busy").stdout  # reading is allowed
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["botorch"])
def test_kill_nine_at_any_moment_of_the_whole_command(engine, family, tmp_path):
    """From start-up to writing the checkpoint: whatever is killed, --resume ends in the same study and model."""
    recipe = family.yaml(tmp_path / "r.yaml", engine=engine, anchor="average", groups="global")
    began = time.monotonic()
    bmm("tune", "--recipe", recipe, "--budget", 12, "--out", tmp_path / "whole")
    duration = time.monotonic() - began
    out = tmp_path / "cut"
    kills = 0
    for share in (0.15, 0.5, 0.7, 0.6, 0.9):
        if (out / "study.db").exists():
            command = [*BMM, "tune", "--resume", str(out)]
        else:
            command = [*BMM, "tune", "--recipe", str(recipe), "--budget", "12", "--out", str(out)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV)
        time.sleep(share * duration)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
    assert kills >= 2
    if (out / "study.db").exists():
        bmm("tune", "--resume", out)
    else:
        bmm("tune", "--recipe", recipe, "--budget", 12, "--out", out)
    rows = [json.loads((tmp_path / d / "result.json").read_text())["trials"] for d in ("cut", "whole")]
    keys = ("number", "kind", "status", "hyperparameters", "scores", "objective")
    assert [[t[k] for k in keys] for t in rows[0]] == [[t[k] for k in keys] for t in rows[1]]
    weights = [(tmp_path / d / "model" / "model.safetensors").read_bytes() for d in ("cut", "whole")]
    assert weights[0] == weights[1]
