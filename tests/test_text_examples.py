"""The text examples from end to end, on tiny BERTs of random weights in place of the packages' own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import packages
from examples.rxn import build as rxn
from examples.rxn.reactions import TOKEN, reactions
from examples.text5 import data

from .test_examples import ENV, ROOT

transformers = pytest.importorskip("transformers")
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 128}  # fmt: skip


def run(module, *flags):
    command = [sys.executable, "-m", f"examples.{module}", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]


SMALL = ("--anchors", "average", "--tuned", "tsv", "--sources", "data", "--budget", 2, "--calibration", 16)


def test_published_encoders_get_one_layout():
    bare = {"encoder.layer.0.output.dense.weight": torch.ones(1)}
    full = {"bert.encoder.layer.0.output.dense.weight": torch.ones(1), "cls.predictions.bias": torch.ones(1)}
    headed = full | {"classifier.bias": torch.ones(1)}
    assert list(rxn.converted(bare)) == list(rxn.converted(full)) == list(full)[:1]
    assert set(rxn.converted(headed)) == {next(iter(full)), "classifier.bias"}


def test_reactions_are_distinct_and_split_into_the_tokens_they_are_made_of():
    made = reactions(200)
    assert made == reactions(200)
    assert len(set(made)) == 200
    assert all("".join(TOKEN.findall(text)) == text and text.count(">>") == 1 for text in made)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({t for r in made for t in TOKEN.findall(r)})]
    words = rxn.tokenizer(vocabulary)
    ids = words("BrC1.[Na+]>>Cl")["input_ids"]
    assert words.convert_ids_to_tokens(ids) == ["[CLS]", "Br", "C", "1", ".", "[Na+]", ">>", "Cl", "[SEP]"]


def test_splits_are_disjoint(monkeypatch):
    monkeypatch.setattr(data, "SIZES", {"test": 20, "validation": 10, "train": 100})
    rows = [(f"text {n}", "abc"[n % 3]) for n in range(120)] + [("TEXT 1", "b"), ("rare", "d")]
    parts, classes = data.split(rows, cap=30, least=5)
    texts = [row["text"].casefold() for part in parts.values() for row in part]
    assert classes == ["a", "b", "c"]
    assert len(texts) == len(set(texts)) == 90
    assert [len(part) for part in parts.values()] == [20, 10, 60]


@pytest.mark.slow
def test_rxn_runs(tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary += sorted({t for r in reactions(600) for t in TOKEN.findall(r)})
    config = transformers.BertConfig(vocab_size=len(vocabulary), num_labels=50, **TINY)
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(config).state_dict()
    for name in rxn.PUBLISHED:
        moved = {k: v + 0.05 * torch.randn(v.shape) * (name != "base") for k, v in base.items()}
        if name != "classes":
            moved = {k: v for k, v in moved.items() if k.startswith("bert.")}
        rxn.write(tmp_path / name, moved, json.loads(config.to_json_string(use_diff=False)), vocabulary)
    table = run("rxn.run", "--models", tmp_path, "--work", tmp_path / "cells", *SMALL)
    assert [row[0] for row in table[2:]] == ["base", "average", "tsv, BMM data", "experts"]
    assert table[-1][1:] == ["100.0", "100.0"]
    assert float(table[2][2]) < 100


@pytest.mark.slow
def test_the_published_models_are_converted_without_loss(tmp_path):
    try:
        source = packages.from_pypi("rxnfp", "0.1.0", tmp_path)
    except packages.Unavailable as error:
        pytest.skip(str(error))
    run("rxn.build", "--models", tmp_path / "models", "--packages", tmp_path)
    stored = source / "rxnfp/models/transformers/bert_ft/pytorch_model.bin"
    theirs = torch.load(stored, weights_only=True)["encoder.layer.3.output.dense.weight"]
    ours = transformers.BertModel.from_pretrained(tmp_path / "models" / "fingerprint")
    assert torch.equal(ours.encoder.layer[3].output.dense.weight, theirs)


@pytest.mark.slow
def test_text5_builds_and_runs(tmp_path):
    zoo = tmp_path / "zoo"
    words = [f"w{n}" for n in range(30)]
    base = zoo / "models" / "base"
    base.mkdir(parents=True)
    (base / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    config = transformers.BertConfig(vocab_size=35, **TINY)
    transformers.BertTokenizer(str(base / "vocab.txt")).save_pretrained(base)
    transformers.BertModel(config).save_pretrained(base)
    rows = [{"text": f"{words[n % 30]} {words[n % 7]}", "label": n % 2} for n in range(40)]
    for task in data.TASKS:
        data.write(zoo / "data", task, {"train": rows, "validation": rows[:10], "test": rows[10:30]}, ["a", "b"])
    run("text5.build", "--zoo", zoo, "--steps", 2, "--batch", 4, "--head", 20)
    for name in ("recipe.yaml", "tasks.yaml"):
        text = (ROOT / "examples" / "text5" / name).read_text()
        (tmp_path / name).write_text(text)
    table = run("text5.run", "--recipe", tmp_path / "recipe.yaml", "--work", tmp_path / "cells", *SMALL)
    assert table[0] == ["model", *data.TASKS, "mean"]
    assert [row[0] for row in table[2:]] == ["base", "average", "tsv, BMM data", "experts"]
    assert Path(tmp_path / "cells" / "tsv-data-b2-s0" / "model" / "model.safetensors").exists()
