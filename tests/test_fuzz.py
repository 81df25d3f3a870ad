"""A sample of benchmarks/fuzz: mutated files are opened or refused by every reader, and nothing else happens."""

import json
import sys

import pytest

import bmm
from benchmarks.fuzz.attack import Watch, attack
from benchmarks.fuzz.documents import RECIPE
from benchmarks.fuzz.mutator import Mutator
from benchmarks.fuzz.readers import READERS, Reader, adapted, adapter

NAMES = [
    "safetensors header", "index of shards", "config.json", "torch archive", "recipe", "mergekit recipe", "task file",
    "masks.json", "study", "adapter", "tokenizer files",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_mutations_are_opened_or_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = attack(name, 60, 1, tmp_path)
    assert not found.crashed
    assert found.opened > 2
    assert found.refused > 10
    assert found.memory < 16 << 20


def test_every_reader_is_sampled_but_the_one_that_builds_models():
    assert set(READERS) == {*NAMES, "config.json, model built"}


@pytest.mark.slow
def test_models_are_built_or_refused(tmp_path):
    found = attack("config.json, model built", 100, 1, tmp_path)
    assert not found.crashed


def test_the_mutations_are_those_of_the_seed():
    draw = [[Mutator(f"{seed} {n}").document(RECIPE) for n in range(9)] for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]


def test_a_crash_and_a_read_outside_would_be_counted(tmp_path, monkeypatch):
    def bad(folder):
        (folder.parent / "secret.txt").write_text("x")
        raise KeyError("x")

    monkeypatch.setitem(READERS, "bad", Reader(lambda f: None, lambda f, m: None, bad))
    watch = Watch()
    found = attack("bad", 2, 0, tmp_path, watch)
    watch.folder = None
    assert (found.opened, found.refused, sum(found.crashed.values())) == (0, 0, 2)
    assert found.outside == {str(tmp_path.resolve() / "secret.txt"): 2}


# what it found


def refused(text, tmp_path, words):
    from bmm.errors import RecipeError

    path = tmp_path / "r.yaml"
    path.write_bytes(text)
    with pytest.raises(RecipeError, match=words) as error:
        bmm.Recipe.load(path)
    assert error.value.hint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"base: \xff", "no UTF-8"),
        (b"- " * 3000, "nested too deeply"),
        (b"[" * 50_000, "nested too deeply"),
        (b"a: 2001-99-99", "not YAML"),
        (b"a: " + b"x" * (1 << 20), "more than 1 MiB"),
        (b'base: "\\ud800"', "surrogates not allowed"),
        (b"a: &a [*a]", "expand to too much"),
        (b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(-1, 12))
         .replace(b"a: &a [*`, *`, *`, *`, *`, *`, *`, *`, *`]", b"a: &a [1]"), "expand to too much"),
    ],
)  # fmt: skip
def test_recipes_that_would_stop_or_fill_the_machine(text, words, tmp_path):
    refused(text, tmp_path, words)


def test_aliases_that_stay_small_are_welcome(tmp_path):
    (tmp_path / "r.yaml").write_text("base: &m m\nexperts: {a: *m}\n")
    assert bmm.Recipe.load(tmp_path / "r.yaml").experts == {"a": str(tmp_path / "m")}


@pytest.mark.parametrize("names", ['"ViT"', "[3]", '{"a": 1}', '["nn"]', '["PreTrainedModel"]'])
def test_a_config_that_names_no_model_is_refused(names, tmp_path):
    from bmm.errors import RecipeError
    from bmm.evaluation.skeleton import from_transformers

    (tmp_path / "config.json").write_text(json.dumps({"architectures": json.loads(names)}))
    with pytest.raises(RecipeError):
        from_transformers(tmp_path)


def test_a_class_with_a_long_name_is_refused_at_once(tmp_path):
    """torch takes minutes to say which class it does not load where the name has a hundred thousand characters."""
    import io
    import time
    import zipfile

    import torch

    from bmm.checkpoint import open_checkpoint
    from bmm.errors import CheckpointError

    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / "m.bin", "w") as new:
        for item in old.namelist():
            long = b'ctorch._utils\n{"a' + b'{"a":' * 20_000
            new.writestr(item, old.read(item).replace(b"ctorch._utils\n", long, 1))
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match="text of 1"):
        open_checkpoint(tmp_path / "m.bin")
    assert time.monotonic() - begun < 5


def test_names_that_are_too_long_for_a_path_are_refused():
    from bmm.checkpoint import open_checkpoint
    from bmm.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"[Nn]ame too long"):
        open_checkpoint("a" * 3000)


@pytest.mark.parametrize("tasks", [None, 3, True])
def test_tasks_that_are_no_list_are_refused(tasks):
    from bmm.errors import RecipeError
    from bmm.evaluation import check_tasks

    with pytest.raises(RecipeError, match="expected a list"):
        check_tasks(tasks)


def adapter_config(folder, **changes):
    from bmm.checkpoint.adapter_config import read_adapter_config

    keys = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(keys | changes))
    return read_adapter_config(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers_pattern": ["["], "layers_to_transform": [0]}, "no pattern"),
        ({"modules_to_save": ["(?i)head"]}, "no pattern"),  # sound alone, not inside a longer one
        ({"rank_pattern": {"(?i)q": 3}}, "no pattern"),
        ({"target_modules": "a{99999999999999999999}"}, "no pattern"),
        ({"lora_alpha": 10**400}, "not a finite number"),
        ({"r": 10**400}, "not a positive whole number"),
        ({"peft_type": "a\nb"}, "only LORA"),
    ],
)
def test_adapter_settings_that_cannot_be_used_are_refused(changes, words, tmp_path):
    from bmm.errors import CheckpointError

    with pytest.raises(CheckpointError, match=words) as error:
        adapter_config(tmp_path, **changes)
    assert "\n" not in error.value.message


def test_a_pattern_with_groups_finds_the_layer_all_the_same(tmp_path):
    config = adapter_config(tmp_path, layers_pattern=["(h|layers)"], layers_to_transform=[1])
    assert [config.is_target(f"m.h.{n}.q") for n in (0, 1, "1" * 5000)] == [False, True, False]


@pytest.mark.parametrize("base", ["~nobody-of-that-name/x", "a" * 3000, "/\0", "\ud800"])
def test_an_adapters_base_that_is_no_path_says_nothing(base, tmp_path):
    from bmm.checkpoint import open_checkpoint
    from bmm.checkpoint.adapters import open_adapter

    folder = tmp_path / "place"
    folder.mkdir()
    adapted(folder)

    class Still(Mutator):
        def randrange(self, *args):
            return 2

        def document(self, document):
            return json.dumps(document | {"base_model_name_or_path": base}).encode()

    adapter(folder, Still(0))
    assert open_adapter(folder, open_checkpoint(folder / "base")).notices == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}, "without its text"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": "<new>"}, "not a list"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": "x", "content": "b"}]}, "without a row number: 'b'"),
        ({"model": {"vocab": {"a": 2**40}}}, "without a row number"),
        ({"model": {"vocab": [1, 2]}}, "no list of tokens"),
        ({"model": {"vocab": {"\ud800": 0}}}, "are no text"),
    ],
)
def test_tokenizers_that_say_nothing_of_rows_are_refused(content, words, tmp_path):
    import torch
    from safetensors.torch import save_file

    from bmm.checkpoint import open_checkpoint
    from bmm.checkpoint.tokens import read_tokens
    from bmm.errors import CheckpointError

    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=words):
        read_tokens(open_checkpoint(tmp_path))
