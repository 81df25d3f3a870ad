"""Task files: from data on disk to a tuned merge without code, and what is refused before the first trial."""

import json
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import bmm
from bmm.api import make_recipe
from bmm.errors import RecipeError
from bmm.functions import load_function
from bmm.run import Run
from bmm.tasks import KINDS, load_tasks
from tests.families import save
from tests.tasks.words import VOCABULARY, save_tokenizer


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def bert(folder):
    """Two experts with heads of unlike sizes; the heads stay out of the merge and come from the experts."""
    keys = save("bert", folder)
    save_tokenizer(folder / "base")
    jsonl(folder / "a.jsonl", [{"sentence": "good film", "label": 1}, {"sentence": "bad", "label": 0}] * 4)
    jsonl(folder / "b.jsonl", [{"sentence": "a red cat", "label": n % 3} for n in range(8)])
    file = folder / "b" / "model.safetensors"
    tensors = load_file(file)
    tensors |= {"classifier.weight": torch.randn(3, 16), "classifier.bias": torch.zeros(3)}
    save_file(tensors, file, {"format": "pt"})
    tasks = {
        name: {"kind": "text_classification", "train": f"{name}.jsonl", "validation": f"{name}.jsonl",
               "test": f"{name}.jsonl", "head": name, "columns": {"text": "sentence"}}
        for name in ("a", "b")
    }  # fmt: skip
    return keys | {"skip": ["classifier.*"]}, tasks


def clip(folder):
    keys = save("clip", folder)
    save_tokenizer(folder / "base", end=True)
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        np.savez(folder / f"{part}.npz", image=generator.standard_normal((9, 3, 8, 8), dtype=np.float32),
                 label=np.arange(9) % 2)  # fmt: skip
    tasks = {
        "a": {"kind": "image_classification", "train": "train.npz", "validation": "train.npz", "test": "test.npz",
              "classes": ["cat", "dog"], "zero_shot": {"templates": ["a photo of a {}", "the {}"]}},
        "b": {"kind": "image_classification", "train": "train.npz", "validation": "test.npz",
              "head": "head.safetensors", "limit": {"validation": 5}},
    }  # fmt: skip
    save_file({"weight": torch.randn(2, 8)}, folder / "head.safetensors")
    return keys, tasks


def llama(folder):
    keys = save("llama", folder)
    save_tokenizer(folder / "base")
    jsonl(folder / "q.jsonl", [{"x": "the sky is", "options": ["blue", "red cat"], "answer": n % 2} for n in range(6)])
    jsonl(folder / "t.jsonl", [{"text": "the sky is blue"}, {"text": "a photo of a red dog"}])
    tasks = {
        "a": {"kind": "multiple_choice", "template": "{x}", "train": "q.jsonl", "validation": "q.jsonl"},
        "b": {"kind": "perplexity", "train": "t.jsonl", "validation": "t.jsonl", "max_tokens": 8},
    }
    return keys, tasks


def t5(folder):
    keys = save("t5", folder)
    save_tokenizer(folder / "base", end=True)
    jsonl(folder / "x.jsonl", [{"question": f"w{n} w{2 * n}", "answer": VOCABULARY[3:]} for n in range(20)])
    jsonl(folder / "q.jsonl", [{"question": "the sky", "options": ["blue", "red"], "answer": n % 2} for n in range(5)])
    tasks = {
        "a": {
            "kind": "exact_match",
            "train": "x.jsonl",
            "validation": "x.jsonl",
            "max_new_tokens": 6,
            "pattern": r"^\s*(\S+)",
        },
        "b": {"kind": "multiple_choice", "train": "q.jsonl", "validation": "q.jsonl"},
    }
    return keys, tasks


@pytest.mark.parametrize("build", [bert, clip, llama, t5])
def test_a_merge_tuned_without_code(build, tmp_path):
    keys, described = build(tmp_path)
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    recipe = {**keys, "base": "base", "experts": {"a": "a", "b": "b"}, "tasks": "tasks.yaml", "grams": "data",
              "anchor": "task_arithmetic", "engine": "sobol", "budget": 3, "groups": "global"}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = bmm.tune(tmp_path / "recipe.yaml", out=str(tmp_path / "run"))
    assert [t.status for t in result.trials] == ["completed"] * 3, [t.error for t in result.trials]
    assert {s.task for s in result.validation["best"]} == {"a", "b"}
    assert all(0 <= s.value <= 1 for s in result.validation["best"])
    assert not any(n.startswith("classifier") for n in load_file(tmp_path / "run" / "model" / "model.safetensors"))


def test_functions_in_a_task_file(tmp_path):
    keys = save("llama", tmp_path)
    (tmp_path / "judge.py").write_text("def dev(model):\n    return float(model.lm_head.weight.square().mean())\n")
    one = {"kind": "function", "validation": "judge.py:dev", "test": "judge.py:dev"}
    (tmp_path / "tasks.json").write_text(json.dumps({"a": one, "b": one}))
    keys |= {"tasks": str(tmp_path / "tasks.json"), "grams": "datafree", "groups": "global", "anchor": "average"}
    run = Run(make_recipe(keys))
    expected = float(run.pool.experts[0]["model.embed_tokens.weight"].square().mean())
    assert run.score_experts()[0].value == pytest.approx(expected, rel=1e-5)
    found = bmm.tune(keys, engine="sobol", budget=2, out=str(tmp_path / "run"))
    assert len(found.trials) == 2


HEAD = "a:\n  kind: perplexity\n  validation: d.jsonl\n  "
WRONG = [
    ("a: {kind: text_classification, validation: none.jsonl}", r"line 1: a: validation: .*no data at .*none\.jsonl"),
    ("a: {kind: text_classification, validation: empty.jsonl}", r"a: validation: .*empty\.jsonl is empty"),
    ("a:\n  kind: text_classification\n  validation: d.jsonl", r"line 3: a: validation: .*no column 'text'"),
    ("a:\n  kind: text_classification\n  columns: {text: sentence}\n  classes: [x, y]\n  validation: d.jsonl",
     r"line 5: a: validation: .*d\.jsonl, line 2: label 7 is outside the classes"),
    ("a:\n  kind: text_clasification", r"line 2: a: kind: no kind 'text_clasification'"),
    ("a:\n  kind: perplexity\n  validaton: d.jsonl", r"line 3: a: validaton: unknown key for perplexity"),
    ("a:\n  kind: perplexity", r"line 1: a: perplexity needs validation"),
    (HEAD + "max_tokens: many", r"line 4: a: max_tokens: 'many' does not fit"),
    (HEAD + "template: '{body}'", r"line 3: a: validation: .*no column 'body'"),
    (HEAD + "limit: {dev: 3}", r"line 4: a: limit: dev: unknown key"),
    (HEAD + "limit: {train: 0}", r"line 4: a: limit: .*does not fit"),
    (HEAD + "tokenizer: nowhere", r"line 4: a: tokenizer: no tokenizer"),
    ("a:\n  kind: text_classification\n  validation: d.jsonl\n  head: nowhere.safetensors", r"line 4: a: head: "),
    ("a:\n  kind: image_classification\n  validation: d.jsonl\n  head: a.safetensors\n  zero_shot: {}",
     r"line 5: a: zero_shot: head and zero_shot exclude"),
    ("a:\n  kind: image_classification\n  validation: d.jsonl\n  zero_shot: {}", r"zero_shot needs class names"),
    ("a:\n  kind: image_classification\n  validation: d.jsonl\n  zero_shot: {template: x}",
     r"zero_shot: template: unknown"),
    ("a:\n  kind: function\n  validation: here.py", r"line 3: a: validation: 'here\.py' does not fit"),
    ("a:\n  kind: function\n  validation: here.py:f", r"line 3: a: validation: .*no file .*here\.py"),
    ("a:\n  kind: lm_eval\n  tasks: [arc_easy]\n  validation: [5, 2]", r"line 4: a: validation: \[5, 2\] does not fit"),
    ("a: 3", r"line 1: a: int, not a mapping"),
    ("a: {kind: perplexity}\na: {kind: perplexity}", r"line 2: a is there twice"),
    ("[1, 2]", r"maps names of tasks"),
    ("a: [", r"is not YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[m for _, m in WRONG])
def test_what_is_wrong_is_said_at_once_with_line_and_key(text, message, tmp_path):
    jsonl(tmp_path / "d.jsonl", [{"sentence": "good", "label": 0}, {"sentence": "bad", "label": 7}])
    (tmp_path / "empty.jsonl").write_text("")
    save_tokenizer(tmp_path / "base")
    (tmp_path / "tasks.yaml").write_text(textwrap.dedent(text))
    with pytest.raises(RecipeError, match=message) as caught:
        load_tasks(tmp_path / "tasks.yaml", tmp_path / "base", load_function)
    assert "tasks.yaml" in caught.value.message
    assert caught.value.hint


def test_a_task_file_that_is_not_there(tmp_path):
    keys = save("llama", tmp_path)
    with pytest.raises(RecipeError, match="cannot read"):
        Run(make_recipe(keys | {"tasks": str(tmp_path / "tasks.yaml")}))


def test_paths_of_task_files_are_relative_to_the_recipe(tmp_path):
    recipe = make_recipe({"base": "b", "experts": {"a": "a"}, "tasks": "sub/tasks.yml"}).relative_to(tmp_path)
    assert recipe.tasks == str(tmp_path / "sub" / "tasks.yml")


def test_the_examples_of_the_documentation_have_the_keys_of_their_kinds(tmp_path):
    """docs/tasks.md: every kind has an example, and reading one stops no earlier than at its data."""
    page = (Path(bmm.__file__).parents[1] / "docs" / "tasks.md").read_text()
    seen = set()
    for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        file = tmp_path / "tasks.yaml"
        file.write_text(text)
        seen |= {entry["kind"] for entry in yaml.safe_load(text).values()}
        with pytest.raises(RecipeError, match=r"no data|no tokenizer|head: |no file|lm-evaluation|zero_shot: .*"):
            load_tasks(file, tmp_path, load_function)
    assert seen == set(KINDS)
