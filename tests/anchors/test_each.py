"""A way of merging for every tensor: the same result as the method over the whole model, whatever the size."""

import pytest
import torch
from safetensors.torch import save_file

from bmm.anchors import ANCHORS, Way, get, merge, merge_each, resolve_knobs
from bmm.anchors.inputs import PIECE
from bmm.anchors.model_stock import model_stock
from bmm.checkpoint import open_checkpoint
from bmm.errors import MergeError
from tests.anchors.models import family

ALONE = [name for name, row in ANCHORS.items() if not row.scan and not row.needs and not row.matrices]


@pytest.mark.parametrize("name", ALONE)
def test_one_way_for_all_is_the_method_itself(name):
    base, experts = family(2)
    anchor = get(name)
    knobs = resolve_knobs(anchor, {})
    way = Way(anchor, [1.0, 1.0], knobs, float(knobs.get("scale", 1.0)))
    found = dict(merge_each(base, experts, lambda _: way))
    for key, expected in merge(name, base, experts).items():
        torch.testing.assert_close(found[key], expected, rtol=0, atol=1e-6)


def test_large_tensors_come_from_disk_in_pieces(tmp_path):
    generator = torch.Generator().manual_seed(0)
    models = [{"w": torch.randn(2, PIECE, generator=generator)} for _ in range(3)]
    for number, model in enumerate(models):
        save_file(model, tmp_path / f"{number}.safetensors")
    base, *experts = (open_checkpoint(tmp_path / f"{number}.safetensors") for number in range(3))
    ways = {"w": Way(get("slerp"), [1.0, 1.0], {"t": 0.25, "space": "weights"})}
    seen = []
    found = dict(merge_each(base, experts, ways.__getitem__, progress=lambda *done: seen.append(done)))
    torch.testing.assert_close(found["w"], merge("slerp", models[0], models[1:], t=0.25)["w"])
    assert seen == [("merge", 1, 1)]
    narrow = dict(merge_each(base, experts, ways.__getitem__, dtypes={"w": torch.float16}))
    assert torch.equal(narrow["w"], found["w"].half())


def test_methods_over_the_whole_model_have_no_place():
    base, experts = family(2)
    with pytest.raises(MergeError, match="more than one tensor"):
        dict(merge_each(base, experts, lambda _: Way(get("ties"), [1.0, 1.0], {"density": 0.5, "reduce": "mean"})))


def test_model_stock_beyond_the_base_is_only_for_those_who_ask():
    taus = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    context = type("C", (), {"w0": torch.zeros(2)})()
    assert not model_stock(taus, context, per="tensor").any()
    cos = -(0.5**0.5)
    expected = 2 * cos / (1 + cos) * taus.mean(0)
    torch.testing.assert_close(model_stock(taus, context, per="tensor", beyond=True), expected)
