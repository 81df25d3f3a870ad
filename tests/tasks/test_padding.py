"""Batches of text are padded to their own longest row, and nothing but the time they take changes."""

import pickle
from dataclasses import replace

import pytest
import torch

from bmm import tasks
from bmm.evaluation import score_tasks, split_validation
from bmm.evaluation.agreement import judged_by_experts
from bmm.evaluation.padded import Padded
from tests.tasks.test_builders import QUESTIONS, jsonl, model
from tests.tasks.words import VOCABULARY, save_tokenizer


def rows(kind):
    """Rows of unlike lengths, in no order of length."""
    texts = [" ".join(VOCABULARY[4 + (n * k) % 40] for k in range(n)) for n in (2, 9, 3, 10, 2, 5, 7, 3)]
    if kind == "choice":
        return [q | {"question": f"{text} {q['question']}"} for text in texts for q in QUESTIONS]
    column = "question" if kind == "match" else "text"
    return [{column: text, "label": n % 2, "answer": "red"} for n, text in enumerate(texts)]


def built(kind, folder, seq2seq=False):
    save_tokenizer(folder, end=seq2seq)
    splits = tasks.Splits(*[jsonl(folder / "d.jsonl", rows(kind))] * 3)
    make = {
        "classes": lambda: tasks.text_classification("t", splits, tokenizer=folder, labels=2, batch_size=3),
        "choice": lambda: tasks.multiple_choice("t", splits, tokenizer=folder, seq2seq=seq2seq, batch_size=3),
        "match": lambda: tasks.exact_match("t", splits, tokenizer=folder, seq2seq=seq2seq, batch_size=3),
        "perplexity": lambda: tasks.perplexity("t", splits, tokenizer=folder, batch_size=3),
    }
    return make[kind]()


CASES = [
    ("classes", "bert"), ("choice", "gpt2"), ("choice", "t5"), ("match", "llama"), ("match", "t5"),
    ("perplexity", "llama"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_scores_are_those_of_rows_padded_to_the_longest_of_all(kind, name, tmp_path):
    task, net = built(kind, tmp_path, name == "t5"), model(name)
    inputs, targets = task.validation
    wide = replace(task, validation=(dict(inputs), targets))
    found, expected = (score_tasks(net, {}, [t], "validation")[0] for t in (task, wide))
    assert found.n == expected.n
    assert found.value == pytest.approx(expected.value, rel=1e-4, abs=1e-6)
    first = next(iter(inputs))
    widths = [batch[first].shape[-1] for batch, _ in task.batches("validation")]
    assert max(widths) == inputs[first].shape[-1]
    assert widths[-1] < widths[0]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_row_comes_once_with_its_target_and_all_its_tokens(kind, name, tmp_path):
    task = built(kind, tmp_path, name == "t5")
    inputs, targets = task.validation
    for mask, names in inputs.masks.items():
        for tensor in names:

            def row(batch, n, mask=mask, tensor=tensor):
                return batch[tensor][n][batch[mask][n] != 0].tolist()

            def target(value):
                return [v for v in value.flatten().tolist() if v >= 0]

            whole = sorted((row(inputs, n), target(targets[n])) for n in range(len(targets)))
            batches = [(row(x, n), target(y[n])) for x, y in task.batches("validation") for n in range(len(y))]
            assert sorted(batches) == whole


def test_held_out_inputs_are_told_by_their_place_and_stay_padded(tmp_path):
    task = built("perplexity", tmp_path)
    (seen,), (held,) = split_validation([task], 0.25, 0)
    assert isinstance(held.validation[0], Padded)
    plain = replace(task, validation=(dict(task.validation[0]), task.validation[1]))
    for part, expected in zip((seen, held), (p[0] for p in split_validation([plain], 0.25, 0)), strict=True):
        width = part.validation[0]["input_ids"].shape[1]
        assert torch.equal(part.validation[0]["input_ids"], expected.validation[0]["input_ids"][:, :width])
        assert not expected.validation[0]["attention_mask"][:, width:].any()


def test_calibration_inputs_keep_one_width_and_their_order(tmp_path):
    task = built("perplexity", tmp_path)
    batches = list(task.calibration_batches(batch_size=3))
    assert len({b["input_ids"].shape[1] for b in batches}) == 1
    assert torch.equal(torch.cat([b["input_ids"] for b in batches]), task.calibration["input_ids"])


def test_agreement_on_texts_counts_no_padding(tmp_path):
    task, net, expert = built("perplexity", tmp_path), model("llama"), model("llama", seed=1)

    def outputs(_, asked, batches):
        with torch.no_grad():
            return [asked.forward(expert, inputs) for inputs, _ in batches]

    judged = judged_by_experts([task], [{}], outputs)["t"]
    single = judged_by_experts([replace(task, batch_size=1)], [{}], outputs)["t"]  # no padding at all
    found = [score_tasks(net, {}, [t], "validation")[0].value for t in (judged, single)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] < 1


def test_padded_inputs_travel_between_processes(tmp_path):
    inputs, _ = built("classes", tmp_path).validation
    again = pickle.loads(pickle.dumps(inputs))
    assert isinstance(again, Padded)
    assert again.masks == inputs.masks
    assert [i.tolist() for i in again.by_length(3)] == [i.tolist() for i in inputs.by_length(3)]
