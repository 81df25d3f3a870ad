"""lm-evaluation-harness itself, on tasks with local data: skipped where it is not installed."""

import json
import pickle

import pytest
import torch
import yaml

import bmm
from bmm import tasks
from bmm.errors import RecipeError
from bmm.evaluation import score_tasks
from bmm.tasks import harness
from tests.tasks.test_builders import jsonl, model
from tests.tasks.words import save_tokenizer

lm_eval = pytest.importorskip("lm_eval")
WORDS = ["red", "green", "blue", "good", "bad", "cat", "dog"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Base, two experts and a tokenizer; a folder of tasks: multiple choice, written answers, a group, a tag."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "tasks").mkdir()
    base = model("llama")
    base.save_pretrained(folder / "base")
    for seed, name in enumerate(("a", "b"), 1):
        torch.manual_seed(seed)
        expert = model("llama")
        expert.load_state_dict({k: v + 0.3 * torch.randn_like(v) for k, v in base.state_dict().items()})
        expert.save_pretrained(folder / name)
    save_tokenizer(folder / "base")
    docs = [
        {"question": f"the {a} sky is", "options": [b, c], "answer": n % 2, "text": b}
        for n, (a, b, c) in enumerate((x, y, z) for x in WORDS[:3] for y in WORDS for z in WORDS[::-1] if y != z)
    ]
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(jsonl(folder / "d.jsonl", docs))}}}
    choice = data | {
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "options", "doc_to_target": "answer",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }  # fmt: skip
    written = choice | {
        "output_type": "generate_until", "doc_to_target": "text", "fewshot_split": "test",
        "generation_kwargs": {"max_gen_toks": 3, "until": ["</s>"]},
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True},
            {"metric": "bleu", "aggregation": "bleu", "higher_is_better": False},
        ],
        "filter_list": [
            {"name": name, "filter": [{"function": "regex", "regex_pattern": regex}, {"function": "take_first"}]}
            for name, regex in (("strict", "^(.*)$"), ("first-word", r"(\w+)"))
        ],
    }  # fmt: skip
    del written["doc_to_choice"]
    files = {
        "colours": choice | {"task": "bmm_colours", "tag": "bmm_tag"},
        "zero": choice | {"task": "bmm_zero", "tag": "bmm_tag", "num_fewshot": 0},
        "written": written | {"task": "bmm_written"},
        "group": {"group": "bmm_group", "task": ["bmm_colours", "bmm_zero"]},
    }
    for name, content in files.items():
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch):
    """The ten thousand tasks that come with the harness take ten seconds to be found."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **given: TaskManager(include_defaults=False, **given))


def reference(place, checkpoint, name, documents, shots=0):
    """The harness's own run of a checkpoint on disk."""
    from lm_eval.tasks import TaskManager

    given = {"pretrained": str(checkpoint), "tokenizer": str(place / "base"), "dtype": "float32"}
    found = lm_eval.simple_evaluate(
        "hf", given, [name], shots, 4, device="cpu", samples={name: list(documents)}, bootstrap_iters=0,
        log_samples=False, task_manager=TaskManager(include_path=str(place / "tasks")),
    )  # fmt: skip
    return found["results"][name]


def made(place, names, **options):
    return tasks.harness_task("h", names, place / "base", include=place / "tasks", **options)


def test_a_study_from_a_task_file_scores_as_the_harness_does(place, tmp_path, capfd):
    entry = {"kind": "lm_eval", "include": str(place / "tasks"), "validation": [0, 30], "test": [40, 90]}
    file = tmp_path / "tasks.yaml"
    entries = {"a": entry | {"tasks": ["bmm_colours"]}, "b": entry | {"tasks": ["bmm_group"], "metric": "acc_norm"}}
    file.write_text(yaml.safe_dump(entries))
    recipe = {
        "base": str(place / "base"), "experts": {n: str(place / n) for n in "ab"}, "tasks": str(file),
        "anchor": "task_arithmetic", "grams": "datafree", "engine": "sobol", "budget": 3, "groups": "global",
    }  # fmt: skip
    result = bmm.tune(recipe, out=str(tmp_path / "run"))
    assert "loglikelihood requests" not in capfd.readouterr().err  # no bars of its own
    assert [t.status for t in result.trials] == ["completed"] * 3
    assert len({json.dumps(t.scores) for t in result.trials}) > 1
    checkpoint = result.paths["checkpoint"]
    own = reference(place, checkpoint, "bmm_colours", range(40, 90))
    test = {s.task: s.value for s in result.test["best"]}
    assert test == {"a": own["acc,none"], "b": own["acc_norm,none"]}  # the group's other task has the same documents


@pytest.mark.parametrize("metric", ["exact_match", "exact_match,strict", "exact_match,first-word"])
def test_written_answers_and_the_filter_that_is_named(place, metric):
    net = model("llama", seed=3)
    net.save_pretrained(place / "third")
    task = made(place, ["bmm_written"], metric=metric, validation=(0, 25), shots=2)
    own = reference(place, place / "third", "bmm_written", range(25), shots=2)
    key = metric if "," in metric else "exact_match,strict"
    assert score_tasks(net, {}, [task])[0].value == own[key]


def test_global_random_state_stays_and_runs_repeat(place):
    task, net = made(place, ["bmm_colours"], validation=(0, 20), shots=0), model("llama")
    before = torch.get_rng_state()
    scores = [score_tasks(net, {}, [t])[0].value for t in (task, task, pickle.loads(pickle.dumps(task)))]
    assert len(set(scores)) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_tags_and_ranges_up_to_the_end(place):
    one, both = (made(place, [n], validation=(100, 10**6)) for n in ("bmm_colours", "bmm_tag"))
    net = model("llama")
    assert score_tasks(net, {}, [one])[0].value == score_tasks(net, {}, [both])[0].value


@pytest.mark.parametrize(
    ("names", "options", "message", "hint"),
    [
        (["bmm_colour"], {}, "no task 'bmm_colour'", "bmm_colours"),
        (["qqq"], {}, "no task 'qqq'", "lm-eval ls tasks"),
        (["bmm_colours"], {"metric": "f1"}, "bmm_colours has no metric 'f1'", "acc, acc_norm"),
        (["bmm_written"], {"metric": "bleu"}, "a lower value", ""),
        (["bmm_zero"], {"shots": 1}, "bmm_zero takes no examples", "shots: 0"),
        (["bmm_colours"], {"validation": (500, 600)}, "126 documents, none from number 500", "ranges"),
        (["bmm_colours"], {"include": "/no/such/folder"}, "no folder /no/such/folder", ""),
    ],
)
def test_mistakes_are_named_before_any_model_runs(place, names, options, message, hint):
    with pytest.raises(RecipeError, match=message) as error:
        tasks.harness_task("h", names, place / "base", **{"include": place / "tasks"} | options)
    assert hint in error.value.hint


def test_a_model_of_ones_own_is_refused(place):
    task = made(place, ["bmm_colours"])
    with pytest.raises(RecipeError, match="Linear is no model of transformers"):
        score_tasks(torch.nn.Linear(1, 1), {}, [task])


def test_data_that_cannot_be_loaded_are_named(place, tmp_path):
    content = yaml.safe_load((place / "tasks" / "colours.yaml").read_text())
    content["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "none.jsonl")
    (tmp_path / "gone.yaml").write_text(yaml.safe_dump(content | {"task": "bmm_gone"}))
    with pytest.raises(RecipeError, match=r"bmm_gone cannot be loaded: .*none\.jsonl"):
        harness.harness_task("h", ["bmm_gone"], place / "base", include=tmp_path)
