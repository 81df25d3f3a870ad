import logging
import random
import re
import subprocess
import sys
import tomllib
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import bmm
from bmm.errors import RecipeError, StudyError
from bmm.recipe import Recipe
from bmm.records import Trial
from bmm.search.engine import ENGINES, build_engine
from bmm.search.engines import ax as ax_module
from bmm.search.engines.ax import AxEngine
from bmm.search.engines.common import SOBOL_TRIALS, SobolEngine, seeded
from bmm.search.space import Space
from tests.search.problem import REFERENCE, SPACE
from tests.search.study_rows import rows_of


def marked(names):
    """Parameters of a test over engines: a slow one is marked so and given time, one that is not installed skips."""
    slow = pytest.mark.slow, pytest.mark.timeout(3600)
    for name in names:
        skip = pytest.mark.skipif(not ENGINES[name].installed, reason=f"{name} needs {ENGINES[name].extra}")
        yield pytest.param(name, marks=[skip, *slow] if name == "saasbo" else skip)


MODELS = list(marked(name for name in ENGINES if name != "sobol"))
ODD_SPACE = Space.for_groups(["encoder.layers/0-3 (q, k)", "x0", "mean"])


def units(rows, space=SPACE):
    return np.array([space.to_unit(space.point_of(row.hyperparameters)) for row in rows])


@pytest.mark.parametrize("name", marked(ENGINES))
def test_contract_of_every_engine(name):
    """Points inside the box, a pure function of space, seed and rows, another for another seed."""
    rows = rows_of(SPACE, 9)
    suggestion = build_engine(name, SPACE, 3).ask(rows)
    assert not suggestion.notice
    assert all(p.low <= suggestion.point[p.name] <= p.high for p in SPACE.parameters)
    assert suggestion.point.keys() == {p.name for p in SPACE.parameters}
    used = build_engine(name, SPACE, 3)
    used.ask(rows[:8])
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002  another state of the global generators
    random.seed(99)
    assert used.ask(rows) == suggestion
    assert build_engine(name, SPACE, 4).ask(rows).point != suggestion.point
    number = len(rows)
    repeated = Trial(number, "search", "failed", SPACE.to_hyperparameters(suggestion.point), error="OOM")
    assert build_engine(name, SPACE, 3).ask([*rows, repeated]).point != suggestion.point


@pytest.mark.parametrize("name", marked(ENGINES))
def test_an_engine_leaves_the_process_as_it_was(name):
    rows = rows_of(SPACE, 9)
    build_engine(name, SPACE, 0).ask(rows)  # the imports' own side effects on loggers are not at stake
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)

    def state():
        return (
            torch.get_rng_state().numpy().tobytes(),
            str(np.random.get_state()),  # noqa: NPY002
            random.getstate(),
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            logging.root.level,
            logging.root.manager.disable,
            len(logging.root.handlers),
            list(warnings.filters),
        )

    before = state()
    with torch.inference_mode():
        inside = build_engine(name, SPACE, 0).ask(rows)
    assert not inside.notice
    assert state() == before
    torch.set_num_threads(threads)


def test_sobol_points_fill_the_box_evenly():
    engine = SobolEngine(SPACE, 0)
    points = np.array([engine.unit_point(number) for number in range(64)])
    for column in points.T:
        assert np.bincount(np.minimum(column * 8, 7).astype(int), minlength=8).tolist() == [8] * 8


@pytest.mark.parametrize("name", [name for name in ENGINES if name not in ("sobol", "cma")])
def test_the_first_points_are_quasi_random_and_failures_do_not_use_them_up(name):
    rows = rows_of(SPACE, 2 + SOBOL_TRIALS)
    engine, sobol = build_engine(name, SPACE, 7), SobolEngine(SPACE, 7)
    for count in range(2, len(rows)):
        assert engine.ask(rows[:count]) == sobol.ask(rows[:count])
    failed = [*rows[:-1], replace(rows[-1], status="failed", objective=None, scores={})]
    assert engine.ask(failed) == sobol.ask(failed)


@pytest.mark.parametrize("name", MODELS)
def test_names_with_a_meaning_to_ax_and_an_anchor_at_infinity_are_no_trouble(name):
    suggestion = build_engine(name, ODD_SPACE, 0).ask(rows_of(ODD_SPACE, 8))
    assert not suggestion.notice
    assert suggestion.point.keys() == {p.name for p in ODD_SPACE.parameters}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("values", ["equal", "huge", "tiny"])
def test_objectives_of_any_scale(name, values):
    rows = [row for row in rows_of(SPACE, 10) if row.status == "completed"]
    scale = {"equal": 0.0, "huge": 1e12, "tiny": 1e-12}[values]
    rows = [
        replace(
            row,
            objective=0.5 + scale * row.objective,
            scores={task: 0.5 + scale * value for task, value in row.scores.items()},
        )
        for row in rows
    ]
    suggestion = build_engine(name, SPACE, 0).ask(rows)
    assert not suggestion.notice
    assert all(p.low <= suggestion.point[p.name] <= p.high for p in SPACE.parameters)


@pytest.mark.parametrize("name", MODELS)
def test_failed_and_pending_rows_are_taken_and_avoided(name):
    rows = rows_of(SPACE, 10)
    plain = build_engine(name, SPACE, 0).ask(rows)
    hyperparameters = SPACE.to_hyperparameters(plain.point)
    for status in ("failed", "pending"):
        row = Trial(10, "search", status, hyperparameters)
        after = build_engine(name, SPACE, 0).ask([*rows, row])
        assert not after.notice
        distance = np.abs(SPACE.to_unit(after.point) - SPACE.to_unit(plain.point)).max()
        assert distance > 1e-3


@pytest.mark.parametrize("name", [name for name in ENGINES if name not in ("sobol", "cma")])
def test_before_enough_trials_have_ended_points_are_quasi_random_however_many_are_pending(name):
    engine, sobol = build_engine(name, SPACE, 7), SobolEngine(SPACE, 7)
    rows = [replace(row, status="pending", objective=None, scores={}) for row in rows_of(SPACE, 2 + 2 * SOBOL_TRIALS)]
    assert engine.ask(rows) == sobol.ask(rows)


@pytest.mark.parametrize("name", MODELS)
def test_points_asked_for_while_others_are_pending_all_differ(name):
    rows = rows_of(SPACE, 9)
    engine = build_engine(name, SPACE, 0)
    for number in range(9, 14):
        suggestion = engine.ask(rows)
        assert not suggestion.notice
        rows.append(Trial(number, "search", "pending", SPACE.to_hyperparameters(suggestion.point)))
    gaps = np.abs(units(rows)[:, None] - units(rows)[None]).max(-1) + np.eye(len(rows))
    assert gaps[9:].min() > 1e-3
    finished = [replace(row, status="completed", objective=0.5 + 0.01 * row.number) for row in rows[9:]]
    finished = [replace(row, scores=dict.fromkeys(REFERENCE, 0.5)) for row in finished]
    assert not engine.ask([*rows[:9], *finished]).notice


@pytest.mark.parametrize("name", MODELS)
def test_the_forecasts_of_stopped_rows_count(name):
    rows = rows_of(SPACE, 12)
    points = []
    for objective in (0.2, 0.99):
        stopped = [
            replace(r, status="stopped", objective=objective, scores={"task0": objective})
            if r.number in (7, 8, 9)
            else r
            for r in rows
        ]
        suggestion = build_engine(name, SPACE, 0).ask(stopped)
        assert not suggestion.notice
        points.append(suggestion.point)
    assert points[0] != points[1]


class StubClient:
    """Stands in for Ax's client where it must misbehave."""

    answer: object = None

    def __init__(self, random_seed):
        self.trials = 0

    def attach_trial(self, parameters):
        self.trials += 1
        return self.trials - 1

    def get_next_trials(self, count):
        if isinstance(self.answer, Exception):
            raise self.answer
        return {self.trials: self.answer}

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (RuntimeError("singular matrix"), "RuntimeError: singular matrix"),
        (MemoryError(), "MemoryError"),
        ({f"x{i}": float("nan") for i in range(6)}, "not finite"),
        ({f"x{i}": float(u) for i, u in enumerate(SobolEngine(SPACE, 0).unit_point(4))}, "repeated"),
        ({}, "KeyError"),
    ],
)
def test_where_ax_fails_a_quasi_random_point_is_taken_and_noted(monkeypatch, answer, said):
    monkeypatch.setattr(StubClient, "answer", answer)
    monkeypatch.setattr(ax_module, "_import_ax", lambda: (StubClient, lambda **kwargs: None))
    rows = rows_of(SPACE, 9)
    assert rows[4].hyperparameters == SPACE.to_hyperparameters(SobolEngine(SPACE, 0).ask(rows[:4]).point)
    suggestion = AxEngine(SPACE, 0).ask(rows)
    assert said in suggestion.notice
    assert "quasi-random" in suggestion.notice
    assert suggestion == AxEngine(SPACE, 0).ask(rows)
    gaps = np.abs(units(rows) - SPACE.to_unit(suggestion.point)).max(axis=1)
    assert gaps.min() > 1e-3
    later = [*rows, Trial(9, "search", "failed", SPACE.to_hyperparameters(suggestion.point))]
    assert AxEngine(SPACE, 0).ask(later).point != suggestion.point


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("ax", "ax.api.client"), ("botorch", "botorch.acquisition.logei"), ("turbo", "botorch.optim"),
        ("saasbo", "numpyro"), ("cma", "cma"), ("tpe", "optuna"),
    ],
)  # fmt: skip
def test_a_broken_installation_is_an_error_not_a_random_search(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(StudyError, match=f"'{name}' cannot be loaded") as caught:
        build_engine(name, SPACE, 0).ask(rows_of(SPACE, 9))
    extra = ENGINES[name].extra
    assert f"pip install --upgrade 'bmm-tuner{f'[{extra}]' if extra else ''}'" in caught.value.hint


def test_what_is_not_installed_is_said_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "cma", None)
    assert not ENGINES["cma"].installed
    with pytest.raises(StudyError, match="'cma' cannot be loaded: cma not installed") as caught:
        bmm.tune(zoo="vit8", engine="cma", out=str(tmp_path / "run"))
    assert "bmm-tuner[compare]" in caught.value.hint
    assert not (tmp_path / "run").exists()


def test_the_recipe_knows_the_engines():
    with pytest.raises(RecipeError, match="no engine 'turb'") as caught:
        Recipe.from_dict({"engine": "turb"})
    assert "did you mean turbo" in caught.value.hint
    (key,) = [f for f in fields(Recipe) if f.name == "engine"]
    assert all(f"{name}: {row.summary}" in key.metadata["help"] for name, row in ENGINES.items())


def test_the_extras_install_what_the_engines_need():
    settings = tomllib.loads((Path(bmm.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for row in ENGINES.values():
        if row.needs:
            named = {re.match(r"[\w-]+", wanted)[0] for wanted in settings["optional-dependencies"][row.extra]}
            assert {*row.needs} <= named


def test_global_generators_come_back_even_from_an_error():
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
    with pytest.raises(ZeroDivisionError), seeded(3):
        random.random(), np.random.rand(), torch.rand(1), 1 / 0  # noqa: NPY002
    assert (random.getstate(), str(np.random.get_state())) == before[:2]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_unknown_engine():
    with pytest.raises(RecipeError, match="did you mean sobol"):
        build_engine("sobl", SPACE, 0)


def run_python(code):
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_importing_the_search_loads_no_engine():
    code = (
        "import sys, bmm.search.study\n"
        "assert not {'ax', 'botorch', 'gpytorch', 'scipy', 'torch'} & set(sys.modules), 'loaded early'"
    )
    assert run_python(code) == (0, "", "")


@pytest.mark.slow
def test_engines_say_nothing():
    code = (
        "import sys\n"
        "from bmm.search.engine import ENGINES, build_engine\n"
        "from tests.search.problem import SPACE\n"
        "from tests.search.study_rows import rows_of\n"
        "for count in (7, 12):\n"
        "    rows = rows_of(SPACE, count)\n"
        "    for name in [n for n in ENGINES if ENGINES[n].installed]:\n"
        "        assert not build_engine(name, SPACE, 0).ask(rows + rows[:1] * 3).notice\n"
        "assert {'ax', 'botorch'} <= set(sys.modules)"
    )
    assert run_python(code) == (0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["botorch", "ax", "turbo"])
def test_a_model_beats_sobol_on_a_smooth_function(name):
    space = Space.for_groups(["attention", "mlp"])

    def best(rows):
        return max(row.objective for row in rows if row.status == "completed")

    start, optimum = best(rows_of(space, 2)), 1 / (1 + np.exp(-3))
    gains = np.array([[best(rows_of(space, 22, e, s)) for e in (name, "sobol")] for s in range(5)])
    gains = (gains - start) / (optimum - start)  # (seeds, engines)
    assert gains[:, 0].mean() > max(0.9, gains[:, 1].mean() + 0.1), gains
