"""Large tensors of elementwise methods are merged in flat pieces: alike from memory and from disk, and like a whole."""

import functools

import pytest
import torch
from safetensors.torch import save_file

from bmm.anchors import ANCHORS, dare, inputs, merge, streaming
from bmm.anchors.anchor import total
from bmm.anchors.dare import drop_and_rescale
from bmm.checkpoint import open_checkpoint
from bmm.checkpoint.agreement import TiedView
from bmm.errors import MergeError

from .models import SHAPES, Lazy, family


def count(name):
    return min(3, ANCHORS[name].experts[1] or 3)


ELEMENTWISE = [name for name, anchor in ANCHORS.items() if anchor.elementwise]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(inputs, "PIECE", 16)
    monkeypatch.setattr(dare, "PIECE", 16)


def on_disk(folder, models, suffix=".safetensors"):
    paths = []
    for k, model in enumerate(models):
        paths.append(folder / f"m{k}{suffix}")
        (save_file if suffix == ".safetensors" else torch.save)(model, paths[-1])
    return paths


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_pieces_make_the_whole(name, monkeypatch):
    base, models = family(count(name))
    monkeypatch.setattr(dare, "PIECE", 16)  # draws go by these pieces however the driver cuts
    whole = merge(name, base, models)
    monkeypatch.setattr(inputs, "PIECE", 16)
    assert any(torch.Size(shape).numel() > 2 * 16 for shape in SHAPES.values())
    pieces = merge(name, base, models)
    for key in base:
        torch.testing.assert_close(pieces[key], whole[key], rtol=1e-6, atol=1e-6)
        assert pieces[key].is_contiguous()


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disk_and_memory_give_the_same_bits(name, suffix, dtype, tmp_path, small_pieces):
    base, models = family(count(name), dtype=dtype)
    opened = [open_checkpoint(path) for path in on_disk(tmp_path, [base, *models], suffix)]
    merged, expected = merge(name, opened[0], opened[1:]), merge(name, base, models)
    assert set(merged) == set(expected)
    assert all(torch.equal(merged[key], expected[key]) for key in base)
    mixed = merge(name, opened[0], [models[0], Lazy(models[1]), opened[-1]][: len(models)])
    assert all(torch.equal(mixed[key], expected[key]) for key in base)
    turned = merge(name, base, [opened[1], models[1], opened[-1]][: len(models)])
    assert all(torch.equal(turned[key], expected[key]) for key in base)


def test_pieces_of_a_tied_weight_are_found_under_the_experts_own_name(tmp_path, small_pieces):
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    (path,) = on_disk(tmp_path, [{"head.weight": weight + 1}])
    view = TiedView(open_checkpoint(path), {"embed.weight": "head.weight"})
    merged = merge("task_arithmetic", {"embed.weight": weight}, [view], scale=1.0)
    torch.testing.assert_close(merged["embed.weight"], weight + 1)


@pytest.mark.parametrize("name", ["ties", "slerp", "karcher"])
def test_large_tensors_on_disk_are_never_read_whole(name, tmp_path, small_pieces, monkeypatch):
    base, models = family(2)
    opened = [open_checkpoint(path) for path in on_disk(tmp_path, [base, *models])]
    read = []
    original = type(opened[0]).__getitem__
    monkeypatch.setattr(type(opened[0]), "__getitem__", lambda self, name: (read.append(name), original(self, name))[1])
    merge(name, opened[0], opened[1:])
    large = {n for n, shape in SHAPES.items() if torch.Size(shape).numel() > 16}
    assert large
    assert read
    assert not large & set(read)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_piece_is_that_part_of_the_tensor(suffix, tmp_path):
    model = {"w": torch.arange(60.0).view(3, 4, 5).bfloat16(), "n": torch.arange(7)}
    (path,) = on_disk(tmp_path, [model], suffix)
    checkpoint = open_checkpoint(path)
    for name, start, stop in (("w", 0, 60), ("w", 13, 29), ("w", 59, 60), ("n", 2, 5)):
        piece = checkpoint.piece(name, start, stop)
        assert torch.equal(piece, model[name].reshape(-1)[start:stop])
        assert piece.dtype == model[name].dtype


@pytest.mark.parametrize("name", ["slerp", "multi_slerp", "karcher"])
@pytest.mark.parametrize("space", ["weights", "task_vectors"])
def test_angles_are_those_of_the_whole_tensor(name, space, monkeypatch):
    base, models = family(2)
    models[0]["conv.weight"].view(-1)[:16] = base["conv.weight"].view(-1)[:16]  # a piece that says little of the whole
    models[1]["conv.weight"].view(-1)[:16] *= 3
    models[1]["linear.weight"].view(-1)[-1] = 3e13  # its piece alone is merged in float64
    whole = [merge(n, base, models, space=space) for n in (name, f"{name}+lines")]
    monkeypatch.setattr(inputs, "PIECE", 16)
    for merged, n in zip(whole, (name, f"{name}+lines"), strict=True):
        pieces = merge(n, base, models, space=space)
        for key in base:
            torch.testing.assert_close(pieces[key], merged[key], rtol=2e-5, atol=1e-6)
    merged = merge(name, base, [base, base], space=space)
    assert all(torch.equal(merged[key], base[key]) for key in base)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_numbers_in_any_piece_are_found(bad, tmp_path, small_pieces):
    base, models = family(2)
    for where in (0, 17, 47):
        broken = [dict(models[0]), dict(models[1])]
        broken[1]["conv.weight"] = models[1]["conv.weight"].clone()
        broken[1]["conv.weight"].view(-1)[where] = bad
        with pytest.raises(MergeError, match=r"conv.weight of experts\[1\] holds 1 non-finite"):
            merge("average", base, broken)


def test_experts_that_do_not_agree_are_refused_in_pieces_too(tmp_path, small_pieces):
    base, models = family(2)
    models[1]["conv.weight"] = torch.zeros(4, 3, 3, 2)
    opened = [open_checkpoint(path) for path in on_disk(tmp_path, [base, *models])]
    for first, second in ((base, Lazy(models[1])), (opened[0], opened[2]), (opened[0], models[1])):
        with pytest.raises(MergeError, match=r"conv\.weight is float32"):
            merge("average", first, [models[0], second])


def test_draws_do_not_depend_on_what_stands_before_them(small_pieces):
    """A piece is drawn by its own content: moved behind another, it keeps its mask."""
    first, second = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
    joined = drop_and_rescale(torch.cat([first, second], 1), "w", 0.5, 0)
    assert torch.equal(joined[:, 16:], drop_and_rescale(second, "w", 0.5, 0))
    assert 0 < int((joined == 0).sum()) < 32


def test_threads_are_given_back(small_pieces, monkeypatch):
    threads = torch.get_num_threads()
    seen = []
    kernel = ANCHORS["average"].kernel
    monkeypatch.setitem(
        ANCHORS, "average",
        streaming.replace(
            ANCHORS["average"], kernel=lambda t, c, **k: (seen.append(torch.get_num_threads()), kernel(t, c, **k))[1]
        ),
    )  # fmt: skip
    torch.set_num_threads(2)
    try:
        base, models = family(2)
        for _ in streaming.merge_stream("average", base, models):
            assert torch.get_num_threads() == 2
        assert set(seen) == {1}
        broken = [models[0], models[1] | {"conv.weight": torch.full((4, 3, 2, 2), float("nan"))}]
        with pytest.raises(MergeError):
            merge("average", base, broken)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("shape", [(40,), (6, 5)])
def test_the_sum_over_tasks_takes_one_after_the_other(count, shape):
    taus = torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))
    before = taus.clone()
    found = total(taus)
    assert torch.equal(found, functools.reduce(torch.add, taus))  # alike however a tensor is cut, unlike `sum`
    torch.testing.assert_close(found, taus.sum(0))
    found += 1
    assert torch.equal(taus, before)  # the result is not a part of the input


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_filling_is_reading_a_piece(tmp_path, suffix):
    base, _ = family(1, dtype=torch.bfloat16)
    opened = open_checkpoint(on_disk(tmp_path, [base], suffix)[0])
    for name, tensor in base.items():
        flat = tensor.reshape(-1)
        for start, stop in ((0, len(flat)), (len(flat) // 3, len(flat) // 2), (len(flat), len(flat))):
            out = torch.empty(stop - start, dtype=tensor.dtype)
            opened.fill(name, start, out)
            assert torch.equal(out, flat[start:stop])
            assert torch.equal(opened.piece(name, start, stop), out)
