import pytest
import torch

from bmm import Task
from bmm.errors import RecipeError
from bmm.evaluation.holdout import held_out, split_validation


def parts(validation, share=0.25, seed=0, name="a"):
    (search,), (held,) = split_validation([Task(name, validation)], share, seed)
    return search, held


def inputs_of(task):
    return torch.cat([inputs for inputs, _ in task.pairs("validation")]).tolist()


@pytest.mark.parametrize("share", [0.5, 0.3, 0.25, 0.1, 0.017])
def test_every_stretch_of_inputs_gives_one(share):
    mask = held_out(500, share, 0, "a")
    assert abs(int(mask.sum()) - 500 * share) <= 1
    gaps = torch.diff(mask.nonzero()[:, 0])
    assert int(gaps.max()) < 2 / share + 1
    assert torch.equal(held_out(123, share, 0, "a"), mask[:123])


def test_seeds_and_tasks_draw_their_own():
    masks = [held_out(200, 0.25, seed, name).tolist() for seed, name in ((0, "a"), (1, "a"), (0, "b"), (0, "a"))]
    assert masks[0] == masks[3]
    assert masks[0] not in masks[1:3]


def test_the_two_parts_have_every_input_once_with_its_target():
    data = torch.arange(100), torch.arange(100) * 2
    search, held = parts(data)
    assert sorted(inputs_of(search) + inputs_of(held)) == list(range(100))
    assert len(inputs_of(held)) == 25
    for task in (search, held):
        assert all(torch.equal(targets, inputs * 2) for inputs, targets in task.pairs("validation"))


def test_batches_are_split_as_whole_data_are():
    whole = torch.arange(100), torch.arange(100) * 2
    batches = [(whole[0][s : s + 7], whole[1][s : s + 7]) for s in range(0, 100, 7)]
    for one, other in zip(parts(whole), parts(batches), strict=True):
        assert inputs_of(one) == inputs_of(other)
        assert inputs_of(other) == inputs_of(other)  # a second pass brings the same
        assert all(torch.equal(targets, inputs * 2) for inputs, targets in other.pairs("validation"))


def test_inputs_by_keyword_and_without_labels():
    search, held = parts({"ids": torch.arange(40), "mask": torch.arange(40)})
    found = [batch for task in (search, held) for batch, targets in task.pairs("validation") if targets is None]
    assert sorted(torch.cat([b["ids"] for b in found]).tolist()) == list(range(40))
    assert all(torch.equal(b["ids"], b["mask"]) for b in found)
    search, held = parts([torch.arange(20), torch.arange(20, 40)])
    assert sorted(inputs_of(search) + inputs_of(held)) == list(range(40))


def test_too_few_inputs_are_refused():
    with pytest.raises(RecipeError, match=r"holdout 0\.1 of the 1 validation inputs of task 'a' leaves a part empty"):
        parts((torch.arange(1), torch.arange(1)), 0.1)
    _, held = parts([(torch.arange(2), torch.arange(2))], 0.01, seed=1)
    with pytest.raises(RecipeError, match="empty validation data"):
        inputs_of(held)


def test_without_a_share_nothing_is_held_out():
    tasks = [Task("a", (torch.arange(4), torch.arange(4)))]
    assert split_validation(tasks, 0.0, 0) == (tasks, [])
