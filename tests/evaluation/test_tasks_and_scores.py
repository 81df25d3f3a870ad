import pytest
import torch
from torch import nn

import bmm
from bmm.errors import RecipeError
from bmm.evaluation import check_skeleton, check_tasks, score_tasks, state_slots, swapped


def data(n=10):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(n))
    return x, x.argmax(1)


def test_whole_and_batched_data_score_alike():
    x, y = data(23)
    model = nn.Linear(4, 4)
    whole = bmm.Task("w", (x, y), batch_size=5)
    batches = bmm.Task("b", [(x[:11], y[:11]), (x[11:], y[11:])])
    state = {"weight": torch.eye(4) + 0.4 * torch.randn(4, 4), "bias": torch.zeros(4)}
    a, b = score_tasks(model, state, [whole, batches])
    assert a.value == b.value
    assert a.n == b.n == 23


def test_swapping_restores_the_skeleton_and_copies_nothing():
    model = nn.Linear(4, 4).train()
    before = {n: t.data_ptr() for n, t in state_slots(model).items()}
    replacement = torch.zeros(4, 4)
    with swapped(model, {"weight": replacement}):
        assert model.weight.data_ptr() == replacement.data_ptr()
        assert not model.training
    assert {n: t.data_ptr() for n, t in state_slots(model).items()} == before
    assert model.training


def test_swap_survives_an_error():
    model = nn.Linear(4, 4)
    kept = model.weight.data_ptr()
    with pytest.raises(ZeroDivisionError), swapped(model, {"weight": torch.zeros(4, 4)}):
        raise ZeroDivisionError
    assert model.weight.data_ptr() == kept


def test_half_precision_checkpoints_run_in_the_models_type():
    x, y = data()
    state = {"weight": torch.eye(4).half(), "bias": torch.zeros(4).half()}
    assert score_tasks(nn.Linear(4, 4), state, [bmm.Task("t", (x, y))])[0].value == 1.0


def test_keyword_inputs_and_logits():
    class Out:
        def __init__(self, logits):
            self.logits = logits

    class Net(nn.Module):
        def forward(self, features, scale):
            return Out(features * scale[:, None])

    x, y = data()
    task = bmm.Task("t", ({"features": x, "scale": torch.ones(10)}, y), batch_size=3)
    assert score_tasks(Net(), {}, [task])[0].value == 1.0


def test_calibration_is_cut_to_the_number_asked_for():
    x, y = data(30)
    whole = bmm.Task("t", (x, y), calibration=x)
    assert [len(b) for b in whole.calibration_batches(10, 4)] == [4, 4, 2]
    listed = bmm.Task("t", (x, y), calibration=[x[:7], x[7:]])
    assert [len(b) for b in listed.calibration_batches(10)] == [7, 3]
    with pytest.raises(RecipeError, match="no calibration"):
        next(bmm.Task("t", (x, y)).calibration_batches())


def test_broken_tasks_are_named():
    x, y = data()
    with pytest.raises(RecipeError, match="no tasks"):
        check_tasks([])
    with pytest.raises(RecipeError, match="share a name"):
        check_tasks([bmm.Task("t", (x, y)), bmm.Task("t", (x, y))])
    with pytest.raises(RecipeError, match="do not match experts"):
        check_tasks([bmm.Task("t", (x, y))], ["u"])
    with pytest.raises(RecipeError, match="empty validation"):
        check_tasks([bmm.Task("t", (x[:0], y[:0]))])
    with pytest.raises(RecipeError, match="10 inputs but 9 targets"):
        check_tasks([bmm.Task("t", (x, y[:9]))])
    with pytest.raises(RecipeError, match="one-time iterator"):
        check_tasks([bmm.Task("t", iter([(x, y)]))])
    with pytest.raises(RecipeError, match=r"expected bmm\.Task"):
        check_tasks([(x, y)])


def test_failing_forward_and_wrong_score_length():
    x, y = data()
    with pytest.raises(RecipeError, match="task 't' failed"):
        score_tasks(nn.Linear(5, 4), {}, [bmm.Task("t", (x, y))])
    with pytest.raises(RecipeError, match="returned shape"):
        score_tasks(nn.Linear(4, 4), {}, [bmm.Task("t", (x, y), score=lambda o, t: o)])
    with pytest.raises(RecipeError, match="no autocast"):
        score_tasks(nn.Linear(4, 4), {}, [bmm.Task("t", (x, y))], autocast="int4")


def test_skeleton_must_be_the_checkpoints_architecture():
    model = nn.Linear(4, 3)
    good = {"weight": (3, 4), "bias": (3,)}
    check_skeleton(model, list(good), good)
    with pytest.raises(RecipeError, match="checkpoints lack: bias"):
        check_skeleton(model, ["weight"], {"weight": (3, 4)})
    with pytest.raises(RecipeError, match="model lacks: extra"):
        check_skeleton(model, [*good, "extra"], good | {"extra": (1,)})
    with pytest.raises(RecipeError, match="differ in shape"):
        check_skeleton(model, list(good), good | {"weight": (4, 4)})


def test_tied_parameters_may_be_stored_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    model = Tied()
    check_skeleton(model, ["a.weight"], {"a.weight": (3, 3)})
    with swapped(model, {"a.weight": 2 * torch.eye(3)}):
        assert torch.equal(model(torch.ones(1, 3)), torch.full((1, 3), 4.0))
