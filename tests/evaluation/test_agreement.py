"""Agreement with the experts, and the data it needs: inputs without labels, the same in every pass."""

import math

import pytest
import torch
from torch import nn

import bmm
from bmm.errors import RecipeError
from bmm.evaluation import SteadyBatches, check_tasks, judged_by_experts, score_tasks, task_outputs
from bmm.evaluation.agreement import agreement, jensen_shannon

SURE = 1000.0


def random_logits(n=200, classes=5):
    g = torch.Generator().manual_seed(1)
    scale = torch.logspace(-2, 3, n).unsqueeze(1)
    return scale * torch.randn(n, classes, generator=g), scale.flip(0) * torch.randn(n, classes, generator=g)


def test_divergence_by_hand():
    found = jensen_shannon(
        torch.tensor([[0.0, 0.0], [SURE, 0.0], [SURE, 0.0], [math.log(3), 0.0]]),
        torch.tensor([[SURE, 0.0], [0.0, SURE], [SURE, 0.0], [0.0, math.log(3)]]),
    )
    half = 0.5 * (0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25)) + 0.5 * math.log2(1 / 0.75)
    swapped = 0.75 * math.log2(0.75 / 0.5) + 0.25 * math.log2(0.25 / 0.5)
    assert found.tolist() == pytest.approx([half, 1.0, 0.0, swapped], abs=1e-7)


def test_divergence_is_symmetric_bounded_and_zero_at_home():
    a, b = random_logits()
    there, back = jensen_shannon(a, b), jensen_shannon(b, a)
    assert torch.equal(there, back)
    assert float(there.min()) >= 0
    assert float(there.max()) <= 1
    assert float(there.max()) > 0.9
    for logits in (a, b, a.half(), torch.tensor([[-1e4, 1e4, 0.0]])):
        assert torch.equal(jensen_shannon(logits, logits), torch.zeros(len(logits), dtype=torch.float64))


def test_agreement_is_one_number_an_input_whatever_lies_between():
    a, b = random_logits(n=24)
    per_row = 1 - jensen_shannon(a, b)
    torch.testing.assert_close(agreement(a, b), per_row)
    torch.testing.assert_close(agreement(a.view(4, 6, 5), b.view(4, 6, 5)), per_row.view(4, 6).mean(1))
    assert math.isnan(float(agreement(torch.full((1, 2), math.nan), torch.zeros(1, 2))))


X = torch.randn(23, 4, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "data",
    [X, {"features": X}, [X[:9], X[9:]], [[X[:9]], (X[9:],)], [{"features": X}]],
    ids=["tensor", "mapping", "batches", "batches of one part", "batches of mappings"],
)
def test_validation_data_may_come_without_labels(data):
    task = bmm.Task("t", data, batch_size=10)
    batches = [inputs for inputs, targets in task.pairs("validation") if targets is None]
    parts = [b["features"] if isinstance(b, dict) else b for b in batches]
    assert torch.equal(torch.cat(parts), X)
    assert check_tasks([task], labels=False) == [task]
    with pytest.raises(RecipeError, match="validation data of task 't' have no labels") as error:
        check_tasks([task])
    assert "score_by: agreement" in error.value.hint


def test_test_data_need_labels_and_batches_two_parts():
    with pytest.raises(RecipeError, match="test data of task 't' have no labels") as error:
        check_tasks([bmm.Task("t", X, test=X)], labels=False)
    assert "agreement" not in error.value.hint
    with pytest.raises(RecipeError, match="batch of 3 parts"):
        check_tasks([bmm.Task("t", [(X, X, X)])])
    with pytest.raises(RecipeError, match="empty validation"):
        check_tasks([bmm.Task("t", X[:0])], labels=False)


def judged(model, expert, task):
    def outputs(tensors, task, batches):
        calls.append(task.name)
        return task_outputs(model, tensors, task, batches)

    calls = []
    return judged_by_experts([task], [expert], outputs)["t"], calls


def test_an_expert_agrees_with_itself_exactly_and_runs_once():
    model, g = nn.Linear(4, 3), torch.Generator().manual_seed(4)
    expert = {"weight": torch.randn(3, 4, generator=g), "bias": torch.randn(3, generator=g)}
    other = {"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}
    task, calls = judged(model, expert, bmm.Task("t", X, batch_size=10))
    own = score_tasks(model, expert, [task])[0]
    assert (own.value, own.n) == (1.0, 23)
    found = score_tasks(model, other, [task])[0]
    logits = X @ expert["weight"].T + expert["bias"]
    assert found.value == pytest.approx(float(agreement(torch.zeros(23, 3), logits).mean()), abs=1e-7)
    assert found.value < 1
    assert calls == ["t"]


class Shuffling:
    """A loader that brings its two batches in another order every time."""

    def __init__(self, more=0):
        self.passes, self.more = 0, more

    def __iter__(self):
        self.passes += 1
        parts = [X[:10], X[10:20]]
        if self.more:
            return iter([*parts, *([X[20:]] * (self.passes % 2 == self.more % 2))])
        return iter(parts if self.passes % 2 else parts[::-1])


@pytest.mark.parametrize("more", [0, 1, 2], ids=["shuffled", "shorter", "longer"])
def test_data_that_change_between_passes_are_refused(more):
    batches = SteadyBatches(bmm.Task("t", Shuffling(more)), "validation")
    assert len(list(batches)) == (3 if more == 1 else 2)
    with pytest.raises(RecipeError, match="validation data of task 't' change") as error:
        list(batches)
    assert "shuffle" in error.value.hint


def test_outputs_that_are_no_logits_are_refused_by_name():
    model = nn.Linear(4, 3)
    for forward, what in (
        (lambda m, x: m(x)[:, :1], r"shape \(10, 1\)"),
        (lambda m, x: m(x).argmax(-1), "int64"),
        (lambda m, x: m(x) / 0, "not finite"),
        (lambda m, x: {"logits": m(x)}, "dict"),
    ):
        task = bmm.Task("t", X, forward=forward, batch_size=10)
        with pytest.raises(RecipeError, match=f"task 't' has no class probabilities.*{what}"):
            task_outputs(model, {}, task, task.pairs("validation"))
    with pytest.raises(RecipeError, match="task 't' failed"):
        task_outputs(nn.Linear(5, 3), {}, bmm.Task("t", X), bmm.Task("t", X).pairs("validation"))
