"""A trial's merge does not have the host wait for the device: it reads no number, and copies nothing between them.

On the meta device nothing can be read, and every transfer is seen by its two devices.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bmm
from bmm.evaluation import score_tasks
from bmm.merging import prepare_model
from bmm.recipe import Recipe
from bmm.records import Hyperparameters
from bmm.run import Run
from bmm.solver import prepare

READS = {"aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::nonzero", "aten::is_nonzero"}


class NoSynchronisation(TorchDispatchMode):
    """Refuses what would wait: numbers read from a tensor, and tensors made on one device and brought to another."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        name = operation.name().split(".")[0]
        assert name not in READS, f"{name} waits for the device"
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in (*given, *made)}
        assert len(devices) < 2, f"{name} copies between {devices}"
        return out


def test_the_watch_catches_what_it_should():
    x = torch.ones(3)
    for waits in (lambda: float(x.sum()), lambda: bool((x > 0).all()), lambda: x.to("meta"), lambda: x.nonzero()):
        with pytest.raises(AssertionError), NoSynchronisation():
            waits()
    with NoSynchronisation():
        (2 * x).add_(x, alpha=0.5)


@pytest.fixture(scope="module")
def prepared(family):
    run = Run(Recipe.from_dict(family.recipe(anchor="task_arithmetic", norms="regression")))
    model = prepare_model(run.pool, run.anchor(), run.collect_grams(), search=("anchor_scale",))
    assert {slot.layout for slot in model.slots} >= {"norm", "linear"}
    return model


@pytest.mark.parametrize(
    ("lam", "scale"), [(1.0, None), (0.0, 0.5), (float("inf"), None), (float("inf"), 0.5), (3.0, 0.5)]
)
@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])  # fmt: skip
def test_the_merge_of_a_trial(prepared, device, lam, scale):
    there = replace(
        prepared,
        slots=tuple(replace(slot, prepared=slot.prepared.to(device)) for slot in prepared.slots),
        rest={name: tensor.to(device) for name, tensor in prepared.rest.items()},
        rest_base={name: tensor.to(device) for name, tensor in (prepared.rest_base or {}).items()},
    )
    point = Hyperparameters.uniform(prepared.groups, lam, 0.9)
    point = replace(point, anchor_scale=scale)
    with NoSynchronisation():
        merged = there.merge(point)
    assert {tensor.device.type for tensor in merged.values()} == {device}
    assert {name: tensor.shape for name, tensor in merged.items()} == {
        name: tensor.shape for name, tensor in prepared.merge(point).items()
    }


def test_the_merge_of_a_module_without_evidence_in_some_directions():
    x = torch.randn(3, 8, dtype=torch.float64)
    w0, wa, expert = torch.randn(3, 4, 8)
    module = prepare(w0, [expert], [x.mT @ x], wa).to("meta")
    assert module.remainder is not None
    with NoSynchronisation():
        module.merge(0.5, 0.9, 1.1)


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from tensors."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation.name().split(".")[0] in READS
        return operation(*args, **(kwargs or {}))


def test_a_task_is_scored_with_one_number_read_however_many_batches():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    tasks = [bmm.Task(name, (x, x.argmax(1)), batch_size=7) for name in "ab"]
    state = {"weight": torch.eye(4), "bias": torch.zeros(4)}
    with Reads() as reads:
        scores = score_tasks(torch.nn.Linear(4, 4), state, tasks)
    assert [s.value for s in scores] == [1.0, 1.0]
    assert reads.count == len(tasks)
