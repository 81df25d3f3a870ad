"""Recipes of mergekit: where their models are, what is written, and what a stopped merge leaves."""

import itertools
import json
import math

import pytest
import torch
import yaml
from bmm_cli.main import main
from safetensors.torch import load_file, save_file

import bmm
from bmm.anchors import merge_each
from bmm.checkpoint import open_checkpoint
from bmm.errors import BmmError, CheckpointError, RecipeError
from tests.mergekit.models import BASE, EMBED, NAMES, NORM, A, close, recipe, write


def test_names_are_folders_here_beside_the_recipe_or_given(models, monkeypatch):
    raw = recipe(models, "task_arithmetic", "a", [{"weight": 1}]) | {"base_model": "org/base"}
    raw["models"][0]["model"] = "a"
    (models / "c.yml").write_text(yaml.safe_dump(raw))
    with pytest.raises(RecipeError, match="base_model: no folder 'org/base'") as error:
        bmm.merge_mergekit(models / "c.yml")
    assert "--expert org/base=FOLDER" in error.value.hint
    close(bmm.merge_mergekit(models / "c.yml", models={"org/base": models / "base"})[NORM], BASE + A)
    monkeypatch.chdir(models / "b")
    close(bmm.merge_mergekit("../c.yml", models={"org/base": models / "base"})[NORM], BASE + A)
    with pytest.raises(RecipeError, match="names no model 'org/bse'"):
        bmm.merge_mergekit(models / "c.yml", models={"org/bse": models / "base"})


@pytest.mark.parametrize(
    ("keys", "option", "expected"),
    [
        ({}, "same", torch.float32), ({"dtype": "bfloat16"}, "same", torch.bfloat16),
        ({"dtype": "bfloat16", "out_dtype": "float16"}, "same", torch.float16),
        ({"dtype": "bfloat16"}, "float32", torch.float32),
    ],
)  # fmt: skip
def test_the_dtype_is_the_recipes_or_what_the_models_promote_to(keys, option, expected, models):
    write(models / "half", [1.5, 2.5, 3.5, 4.5], dtype=torch.float16)
    raw = recipe(models, "linear", ["half", "a"], [{"weight": 1}] * 2, base="") | keys
    out = bmm.merge_mergekit(raw, out=models / "out", dtype=option)
    stored = load_file(out / "model.safetensors")
    assert {stored[n].dtype for n in NAMES} == {expected}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == str(expected).removeprefix("torch.")
    close(stored[NORM].float(), (BASE + 0.5 + BASE + A) / 2)


def test_the_recipe_and_its_models_are_on_the_card(models, capsys):
    raw = recipe(models, "ties", "ab", [{"weight": [0, 1]}, {"weight": 0.25}], int8_mask=True)
    text = "# ours\n" + yaml.safe_dump(raw)
    (models / "c.yml").write_text(text)
    with pytest.raises(SystemExit) as done:
        main(["merge", "--from-mergekit", str(models / "c.yml"), "-o", str(models / "out"), "--json"])
    assert done.value.code == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"checkpoint": str(models / "out")}
    assert "note: parameters.int8_mask changes nothing" in shown.err
    card = (models / "out" / "README.md").read_text()
    assert "mergekit recipe `ties`" in card
    assert text in card
    assert (models / "out" / "mergekit_config.yml").read_text() == text
    again = bmm.merge_mergekit(models / "out" / "mergekit_config.yml")
    assert all(torch.equal(again[n], load_file(models / "out" / "model.safetensors")[n]) for n in NAMES)


@pytest.mark.parametrize(
    "flags", [["--lam", "1"], ["--masks"], ["--anchor", "ties"], ["--weights", "a=1"], ["--trial", "1"]]
)
def test_flags_that_say_something_else_are_refused(flags, models, capsys):
    (models / "c.yml").write_text(yaml.safe_dump(recipe(models, "ties")))
    with pytest.raises(SystemExit) as done:
        main(["merge", "--from-mergekit", str(models / "c.yml"), "-o", str(models / "out"), *flags])
    assert done.value.code == 2
    assert "drop" in capsys.readouterr().err


def test_one_vocabulary_is_checked_where_the_recipe_asks_for_a_tokenizer(models):
    def tokens(folder, **rows):
        added = [{"id": 9, "content": "<x>"}]
        text = json.dumps({"model": {"vocab": rows}, "added_tokens": added, "version": folder})
        (models / folder / "tokenizer.json").write_text(text)

    tokens("base", a=0, b=1)
    tokens("a", b=1, a=0)
    raw = recipe(models, "task_arithmetic", "a", [{"weight": 1}]) | {"tokenizer_source": "union"}
    close(bmm.merge_mergekit(raw)[NORM], BASE + A)
    tokens("a", a=1, b=0)
    with pytest.raises(CheckpointError, match=r"2 tokens in another row.*tokenizer 'union'") as error:
        bmm.merge_mergekit(raw)
    assert "one tokenizer" in error.value.hint
    close(bmm.merge_mergekit({k: v for k, v in raw.items() if k != "tokenizer_source"})[NORM], BASE + A)
    (models / "a" / "tokenizer.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        bmm.merge_mergekit(raw)


def test_filters_see_a_tied_weight_as_the_input_embedding(tmp_path):
    for name, value in (("base", 0.0), ("a", 1.0)):
        (tmp_path / name).mkdir()
        model = {n: torch.full((2, 2), value) for n in ("lm_head.weight", EMBED)}
        save_file(model, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"tie_word_embeddings": true}')
    weight = [{"filter": "lm_head", "value": 5.0}, {"filter": "embed_tokens", "value": 2.0}]
    out = bmm.merge_mergekit(recipe(tmp_path, "task_arithmetic", "a", [{"weight": weight}]), out=tmp_path / "out")
    stored = load_file(out / "model.safetensors")
    assert stored[EMBED].tolist() == stored["lm_head.weight"].tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_models_that_do_not_fit_and_values_that_are_not_finite_are_named(models):
    save_file({"other": torch.ones(2)}, models / "c" / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not agree with the base"):
        bmm.merge_mergekit(recipe(models, "ties", "ac", weight=1))
    write(models / "nan", [1.0, math.nan, 0.0, 0.0])
    with pytest.raises(BmmError, match="NaN"):
        bmm.merge_mergekit(recipe(models, "ties", ["nan"], weight=1), out=models / "out")
    assert not (models / "out").exists()


def test_an_interrupted_merge_goes_on_from_its_finished_shards(models, monkeypatch, capsys):
    (models / "c.yml").write_text(yaml.safe_dump(recipe(models, "ties", "ab", weight=1)))
    command = ["merge", "--from-mergekit", str(models / "c.yml"), "-o", str(models / "out"), "--shard-gib", "1e-8"]

    def stops(*args, **keys):
        for count, pair in enumerate(merge_each(*args, **keys)):
            if count == 5:
                raise KeyboardInterrupt
            yield pair

    with monkeypatch.context() as patch:
        patch.setattr(bmm.mergekit.merging, "merge_each", stops)
        with pytest.raises(SystemExit) as done:
            main(command)
    assert done.value.code == 1
    assert not (models / "out").exists()
    asked = []
    monkeypatch.setattr(
        bmm.mergekit.merging, "merge_each", lambda *a, **k: asked.extend(k["names"]) or merge_each(*a, **k)
    )
    with pytest.raises(SystemExit) as done:
        main(command)
    assert done.value.code == 0
    assert "5 of 9 tensors are there from an earlier start" in capsys.readouterr().err
    assert len(asked) == 4
    written, expected = open_checkpoint(models / "out"), bmm.merge_mergekit(models / "c.yml")
    assert all(torch.equal(written[n], expected[n]) for n in expected)


def test_another_recipe_takes_nothing_from_an_interrupted_merge(models, monkeypatch):
    def stops(*args, **keys):
        yield from itertools.islice(merge_each(*args, **keys), 3)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bmm.mergekit.merging, "merge_each", stops)
        with pytest.raises(KeyboardInterrupt):
            bmm.merge_mergekit(recipe(models, "ties", "ab", weight=1), out=models / "out", shard_gib=1e-8)
    other = recipe(models, "ties", "ab", weight=0.5)
    found = open_checkpoint(bmm.merge_mergekit(other, out=models / "out", shard_gib=1e-8))
    expected = bmm.merge_mergekit(other)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_progress_is_in_bytes(models):
    seen = []
    bmm.merge_mergekit(
        recipe(models, "ties", "ab", weight=1),
        progress=lambda stage, done, total, text="": stage == "merge" and seen.append((done, total, text)),
    )
    sizes = [4 * 4] * len(NAMES) + [8]  # 4 numbers each, and the count of steps
    assert {total for _, total, _ in seen} == {sum(sizes)}
    assert sorted(b - a for (a, *_), (b, *_) in itertools.pairwise([(0,), *seen])) == sorted(sizes)
    assert {text for *_, text in seen} == {*NAMES, "steps"}


def test_heads_are_kept_beside_the_merge(models):
    for folder, rows in (("a", 2), ("b", 3)):
        file = models / folder / "model.safetensors"
        save_file(load_file(file) | {"score.weight": torch.full((rows, 2), 7.0)}, file)
    raw = recipe(models, "ties", "ab", weight=1)
    with pytest.raises(CheckpointError, match=r"score\.weight"):
        bmm.merge_mergekit(raw)
    out = bmm.merge_mergekit(raw, out=models / "out", heads="keep")
    assert set(open_checkpoint(out)) == {*NAMES, "steps"}
    kept = {path.name: load_file(path)["score.weight"] for path in (out / "heads").iterdir()}
    assert sorted(tuple(t.shape) for t in kept.values()) == [(2, 2), (3, 2)]
