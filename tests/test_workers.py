"""Tuning with workers from end to end: the rows of one process, tasks by name and as objects, Ray."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import bmm
import bmm.functions
from bmm.errors import RecipeError, StudyError
from bmm.recipe import Recipe
from bmm.run import Run
from bmm.search.database import StudyDatabase
from bmm.search.parallel import cluster
from bmm.search.study import run_study
from bmm.shared import share
from bmm.workers import NUMBERS, Site, check_workers, devices_of, evaluator, experts_logits
from tests.search import workplaces
from tests.search.problem import REFERENCE, SPACE, outcomes
from tests.search.study_rows import rows_of

ROOT = Path(__file__).parents[1]
SHORT = {"anchor": "task_arithmetic", "engine": "sobol", "budget": 6}
has_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


def scored_by(net, inputs, head):
    return net(inputs) @ head.T


def as_objects(family):
    """The family's tasks with a forward that pickle takes."""
    found = bmm.functions.load_function(f"{family.file}:tasks", "tasks")()
    heads = {task.name: task.forward.__defaults__[0] for task in found}
    return [
        bmm.Task(t.name, t.validation, t.test, t.calibration, partial(scored_by, head=heads[t.name])) for t in found
    ]


@pytest.fixture(scope="module")
def alone(family, tmp_path_factory):
    """The same study in one process."""
    return bmm.tune(family.recipe(**SHORT, out=str(tmp_path_factory.mktemp("alone") / "run")))


def test_two_workers_find_the_rows_of_one_process(family, alone, tmp_path):
    out = tmp_path / "run"
    part = bmm.tune(family.recipe(**SHORT | {"budget": 2}, out=str(out)))
    during = []
    result = bmm.tune(
        resume=out, budget=6, workers=2, on_trial=lambda trial, leader: during.append((out / NUMBERS).exists())
    )
    assert part.trials == result.trials[:2]
    assert during == [True] * 4
    assert outcomes(result.trials) == outcomes(alone.trials)
    assert result.validation == alone.validation
    assert not (out / NUMBERS).exists()
    assert result.recipe["workers"] == 2


@pytest.mark.parametrize("score_by", ["labels", "agreement"])
def test_a_workplace_scores_as_the_leader_does_and_runs_no_expert(family, tmp_path, monkeypatch, score_by):
    recipe = Recipe.from_dict(family.recipe(anchor="task_arithmetic", score_by=score_by, out=str(tmp_path)))
    run = Run(recipe)
    run.score_experts()
    prepared = run.prepare()
    point = bmm.Hyperparameters.uniform(prepared.groups, 0.3, 0.9)
    expected = evaluator(run, prepared)(point)
    tasks = as_objects(family)
    shared = share((prepared, tasks, None, experts_logits(run)), tmp_path / NUMBERS)
    monkeypatch.setattr(Run, "outputs", None)  # which runs an expert for its logits
    for route in (shared, shared.as_array()):
        evaluate = Site(recipe, pickle.loads(pickle.dumps(route)))(0)
        assert evaluate(point) == expected
        assert evaluate(bmm.Hyperparameters.uniform(prepared.groups, 3.0)) != expected


@pytest.mark.slow
def test_agreement_early_stopping_and_tasks_as_objects(family, tmp_path):
    keys = family.recipe(**SHORT | {"budget": 14}, score_by="agreement", early_stopping=0.45, search=["weights"])
    keys |= {"tasks": as_objects(family)}
    alone = bmm.tune(out=str(tmp_path / "alone"), **keys)
    result = bmm.tune(out=str(tmp_path / "two"), workers=2, **keys)
    same = [t.number for t in result.trials if t.status == "completed" == alone.trials[t.number].status]
    assert outcomes(result.trials[n] for n in same) == outcomes(alone.trials[n] for n in same)
    assert any(t.status == "stopped" for t in result.trials)
    assert not any(t.status == "failed" for t in result.trials)


def test_what_workers_cannot_have_is_refused_before_any_work(family, tmp_path, monkeypatch):
    def no_work(*_, **__):
        raise AssertionError

    monkeypatch.setattr("bmm.tuning.Run", no_work)
    keys = family.recipe(workers=2, out=str(tmp_path / "run"))
    tasks = [bmm.Task("ring", (torch.zeros(1), torch.zeros(1)), forward=lambda net, x: x)]
    with pytest.raises(RecipeError, match="the tasks cannot be sent to workers") as caught:
        bmm.tune(**keys | {"tasks": tasks})
    assert "FILE.py:FUNCTION" in caught.value.hint
    with pytest.raises(RecipeError, match="the model cannot be sent to workers"):
        bmm.tune(**keys | {"model": lambda: None})
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "forward", scored_by, raising=False)
    monkeypatch.setattr(scored_by, "__module__", "__main__")
    monkeypatch.setattr(scored_by, "__qualname__", "forward")
    tasks = [bmm.Task("ring", (torch.zeros(1), torch.zeros(1)), forward=scored_by)]
    check_workers(Recipe(workers=2), tasks, None)  # a script's own functions are found: workers import it
    monkeypatch.delattr(main, "__file__", raising=False)
    with pytest.raises(RecipeError, match="an interactive session"):
        bmm.tune(**keys | {"tasks": tasks})
    check_workers(Recipe(), tasks, None)
    with pytest.raises(RecipeError, match="workers is 0, must be at least 1"):
        bmm.tune(**keys | {"workers": 0})
    with pytest.raises(RecipeError, match="no executor 'rey'") as caught:
        bmm.tune(**keys | {"executor": "rey"})
    assert "ray" in caught.value.hint


def test_ray_is_refused_where_it_cannot_be(monkeypatch):
    recipe = Recipe(executor="ray")
    with monkeypatch.context() as patch:
        patch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(StudyError, match="ray is not installed") as caught:
            check_workers(recipe, None, None)
        assert "bmm-tuner[ray]" in caught.value.hint
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name)
    check_workers(recipe, None, None)
    with pytest.raises(RecipeError, match="device cuda:1 with executor ray"):
        check_workers(Recipe(executor="ray", device="cuda:1"), None, None)


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_so(family, tmp_path):
    keys = family.recipe(**SHORT, workers=2, out=str(tmp_path / "run"))
    (tmp_path / "script.py").write_text(f"import bmm\nbmm.tune(**{keys!r})\n")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "2 workers in succession ended before they could begin" in done.stderr
    assert "if __name__ == '__main__'" in done.stderr.splitlines()[-1]


def test_cuda_devices_are_taken_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices_of("cuda") == ("cuda:0", "cuda:1", "cuda:2")
    assert devices_of("cuda:1") == ("cuda:1",)
    assert devices_of("cpu") == ("cpu",)


@pytest.mark.parametrize(
    ("nodes", "size", "share"), [([16], 2, 8), ([16, 16], 3, 8), ([2], 2, 1), ([4, 64], 3, 21), ([0, 5], 5, 1)]
)
def test_cpus_of_a_cluster_are_split_so_that_every_worker_finds_a_place(nodes, size, share):
    assert cluster._cpus_each(nodes, size) == share
    with pytest.raises(StudyError, match=f"{sum(nodes)} CPUs for {sum(nodes) + 1} workers"):
        cluster._cpus_each(nodes, sum(nodes) + 1)


def test_gpus_of_a_cluster_are_shared_where_they_are_few():
    assert [cluster._gpus_each(gpus, 4) for gpus in (8, 4, 2, 1)] == [1, 1, 0.5, 0.25]
    assert cluster._gpus_each(3, 4) == 0.5
    with pytest.raises(StudyError, match="has no GPU"):
        cluster._gpus_each(0, 1)


@pytest.mark.slow
def test_the_zoo_from_the_command_line(tmp_path):
    script = tmp_path / "bmm"  # as pip writes it: workers import it, and nothing must happen
    script.write_text("import sys\nfrom bmm_cli.main import main\nif __name__ == '__main__':\n    sys.exit(main())\n")
    command = [sys.executable, str(script), "tune", "--budget", "6", "--workers", "2", "--json"]
    command += ["--anchor", "task_arithmetic", "--grams", "datafree", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    trials = json.loads(done.stdout)["trials"]
    assert [t["status"] for t in trials] == ["completed"] * 6
    assert {int(line.split()[1].split("/")[0]) for line in done.stderr.splitlines() if line.startswith("trial ")} == {
        *range(1, 7)
    }


@has_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_actors_find_the_rows_of_one_process(family, alone, tmp_path, monkeypatch):
    import ray

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    result = bmm.tune(family.recipe(**SHORT, workers=2, executor="ray", out=str(tmp_path / "run")))
    assert outcomes(result.trials) == outcomes(alone.trials)
    assert not ray.is_initialized()
    assert not (tmp_path / "run" / NUMBERS).exists()


@has_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_actors_that_die_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    whole, notices = rows_of(SPACE, 6), []
    lethal = workplaces.name(whole[3].hyperparameters)
    with (
        StudyDatabase.create(tmp_path / "study.db", {}) as database,
        cluster.Actors(lambda cpus: workplaces.Bench(tmp_path, lethal=lethal), 2, notices.append) as crew,
    ):
        trials = run_study(database, SPACE, crew, reference=REFERENCE, budget=6, seed=0, engine="sobol")
    assert trials[3].error.startswith("lost its worker 2 times: was lost (ActorDiedError")
    assert [o[:6] for o in outcomes(trials) if o[0] != 3] == [o[:6] for o in outcomes(whole) if o[0] != 3]
    assert len(notices) == 2
    assert not any(workplaces.alive(pid) for pid, _ in workplaces.seen(tmp_path))
    with (
        pytest.raises(StudyError, match="a worker cannot start: the tasks are gone"),
        cluster.Actors(lambda cpus: workplaces.broken, 1) as crew,
    ):
        crew.wait()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(StudyError, match="no Ray cluster at RAY_ADDRESS=127"):
        cluster.Actors(lambda cpus: workplaces.broken, 1).__enter__()
