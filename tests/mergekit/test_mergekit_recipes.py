"""Recipes of mergekit: every method by hand on small numbers, and what is refused by which key."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import bmm
from bmm.errors import RecipeError
from bmm.mergekit import MergekitConfig
from bmm.mergekit.values import evaluate, parse
from tests.mergekit.models import BASE, EMBED, LAYERS, NORM, A, B, close, merged, q, recipe, up, write

# parameters


@pytest.mark.parametrize(
    ("raw", "depth", "expected"),
    [
        (3, 0.7, 3), ("1e-5", 0, 1e-5), ([0, 10], 0.25, 2.5), ([0, 1, 4], 0.75, 2.5), ([0, 1, 4], 1.0, 4),
        ([5], 0.4, 5), ([False, True, True], 0.4, False), ([False, True, True], 0.5, True),
        ([{"filter": "attn", "value": [0, 2]}, {"value": 9}], 0.5, 1.0),
        ([{"filter": "mlp", "value": 4}, {"filter": "*", "value": 9}], 0.5, 9),
        ([{"filter": "mlp.*", "value": 4}, {"filter": "norm", "value": 9}], 0.5, None),
    ],
)  # fmt: skip
def test_values_gradients_and_filters(raw, depth, expected):
    assert evaluate(parse(raw, "here"), "layers.1.self_attn.q", depth) == expected


def test_gradients_run_over_the_layers_and_what_is_outside_takes_the_first_value(models):
    out = merged(models, "task_arithmetic", "a", [{"weight": [0.0, 1.0, 4.0]}])
    for name, weight in ((EMBED, 0), (q(0), 0), (q(1), 1), (up(1), 1), (q(2), 4), (NORM, 0)):
        close(out[name], BASE + weight * A)


def test_filters_are_parts_of_names_and_the_first_that_fits_counts(models):
    own = {"weight": [{"filter": "self_attn", "value": [1, 3]}, {"filter": "layers.1", "value": 5}, {"value": 0.5}]}
    out = merged(models, "task_arithmetic", "a", [own])
    for name, weight in ((EMBED, 0.5), (q(0), 1), (q(1), 2), (q(2), 3), (up(0), 0.5), (up(1), 5), (NORM, 0.5)):
        close(out[name], BASE + weight * A)


def test_where_no_filter_fits_the_next_level_counts(models):
    own = {"weight": [{"filter": "self_attn", "value": 2}]}
    out = merged(models, "task_arithmetic", "a", [own], weight=[{"filter": "mlp", "value": 3}, {"value": 4}])
    for name, weight in ((q(1), 2), (up(1), 3), (NORM, 4)):
        close(out[name], BASE + weight * A)


def test_slices_have_levels_of_their_own(models):
    raw = recipe(models, "task_arithmetic", "ab", [{"weight": 1.0}], weight=7.0)
    sources = [{**m, "layer_range": [0, LAYERS]} for m in raw.pop("models")]
    raw["slices"] = [{"sources": sources, "parameters": {"weight": [{"filter": "mlp", "value": 2.0}]}}]
    out = bmm.merge_mergekit(raw)
    close(out[up(2)].flatten(), BASE + A + 2 * B)
    close(out[q(2)].flatten(), BASE + A + 7 * B)


# methods


def test_linear(models):
    own = [{"weight": 1.0}, {"weight": 3.0}]
    close(merged(models, "linear", "ab", own, base="")[q(0)], BASE + 0.25 * A + 0.75 * B)
    close(merged(models, "linear", "ab", own, base="", normalize=False)[q(0)], 4 * BASE + A + 3 * B)
    close(merged(models, "linear", "ab", own, weight=4.0)[q(0)], BASE + A / 8 + 3 * B / 8)  # the base is an input


def test_task_arithmetic(models):
    own = [{"weight": 0.5}, {"weight": -0.25}]
    out = merged(models, "task_arithmetic", "ab", own, **{"lambda": [{"filter": "mlp", "value": 2}, {"value": 1}]})
    close(out[q(1)], BASE + 0.5 * A - 0.25 * B)
    close(out[up(1)], BASE + A - 0.5 * B)
    close(merged(models, "task_arithmetic", "ab", own, normalize=True)[NORM], BASE + 2 * A - B)
    close(merged(models, "task_arithmetic", "ab", [{"weight": 0.0}] * 2)[NORM], BASE)


def test_a_listed_base_is_no_input(models):
    raw = recipe(models, "task_arithmetic", "ab", [{"weight": 1.0}, {"weight": 1.0}], normalize=True)
    raw["models"].insert(0, {"model": raw["base_model"], "parameters": {"weight": 5.0}})
    close(bmm.merge_mergekit(raw)[NORM], BASE + (A + B) / 2)


def test_ties_trims_each_tensor_by_each_experts_density(models):
    # a keeps 2 of 4: 0 0 -2 +4; b keeps all: 0 +3 +1 -1, times 2; signs + (by convention), +, 0 taken as +, +
    own = [{"weight": 1.0, "density": 0.5}, {"weight": 2.0, "density": 1.0}]
    close(merged(models, "ties", "ab", own)[q(1)], BASE + torch.tensor([0.0, 3.0, 1.0, 4.0]))
    close(merged(models, "ties", "ab", own, normalize=False)[q(1)], BASE + torch.tensor([0.0, 6.0, 2.0, 4.0]))
    # an l1 norm of 7 in the 6 that stay
    rescaled = merged(models, "ties", "a", [{"weight": 1, "density": 0.5}], rescale=True)
    close(rescaled[NORM], BASE + torch.tensor([0.0, 0.0, -2.0, 4.0]) * 7 / 6)


def test_ties_density_may_vary_over_layers_and_its_mean_divides_by_signed_weights(models):
    out = merged(models, "ties", "a", [{"weight": 1, "density": [0.25, 0.5, 1.0]}])
    for layer, kept in ((0, [0, 0, 0, 4.0]), (1, [0, 0, -2.0, 4.0]), (2, [1.0, 0, -2.0, 4.0])):
        close(out[q(layer)], BASE + torch.tensor(kept))
    # weighted +2 0 -4 +8, 0 -3 -1 +1: signs +, -, -, +, so 1, 3, 5/(2 - 1) and 9/(2 - 1)
    signed = merged(models, "ties", "ab", [{"weight": 2.0}, {"weight": -1.0}])
    close(signed[NORM], BASE + torch.tensor([1.0, 3.0, -5.0, 9.0]))


def test_breadcrumbs_drop_the_largest_then_the_smallest(models):
    # of a: 0 1 -2 4 by size; the largest quarter goes, and what exceeds a half of the entries
    one = [{"weight": 1, "density": 0.5, "gamma": 0.25}]
    close(merged(models, "breadcrumbs", "a", one)[q(1)], BASE + torch.tensor([1.0, 0, -2.0, 0]))
    more = [{"weight": 1, "density": 0.75, "gamma": 0.9}]  # density wins over gamma
    close(merged(models, "breadcrumbs", "a", more)[q(1)], BASE + torch.tensor([1.0, 0, -2.0, 0]))
    two = [{"weight": 1, "density": 0.5, "gamma": 0.25}, {"weight": 1, "density": 1}]
    close(merged(models, "breadcrumbs_ties", "ab", two)[q(1)], BASE + torch.tensor([1.0, 3.0, -2.0, -1.0]))


def test_slerp_goes_from_the_base_along_the_arc(tmp_path):
    write(tmp_path / "a", [3.0, 0.0, 0.0, 0.0])
    write(tmp_path / "b", [0.0, 4.0, 0.0, 0.0])
    raw = recipe(tmp_path, "slerp", "ba", base="a", t=[{"filter": "mlp", "value": [0, 1]}, {"value": 1 / 3}])
    out = bmm.merge_mergekit(raw)
    turned = [3 * math.cos(math.pi / 6), 4 * math.sin(math.pi / 6), 0, 0]
    close(out[q(0)].flatten(), turned)
    close(out[up(0)].flatten(), [3.0, 0, 0, 0])
    close(out[up(2)].flatten(), [0, 4.0, 0, 0])
    own = [{"weight": 1.0}, {"weight": 0.5}]
    close(merged(tmp_path, "nuslerp", "ab", own, base="")[q(0)], turned)
    write(tmp_path / "base", [1.0, 1.0, 1.0, 1.0])
    write(tmp_path / "c", [4.0, 1.0, 1.0, 1.0])
    write(tmp_path / "d", [1.0, 5.0, 1.0, 1.0])
    close(merged(tmp_path, "nuslerp", "cd", own)[q(0)], 1 + torch.tensor(turned))


def test_multislerp_and_karcher_keep_the_mean_length(tmp_path):
    write(tmp_path / "a", [3.0, 0.0, 0.0, 0.0])
    write(tmp_path / "b", [0.0, 5.0, 0.0, 0.0])
    half = 4 / math.sqrt(2)
    close(merged(tmp_path, "karcher", "ab", base="")[q(0)], [half, half, 0, 0])
    # weights 3 and 1: the mean of directions is (3, 1), the mean length 3.5
    out = merged(tmp_path, "multislerp", "ab", [{"weight": 3}, {"weight": 1}], base="")
    close(out[q(0)], [3.5 * 3 / math.sqrt(10), 3.5 / math.sqrt(10), 0, 0])
    write(tmp_path / "base", [1.0, 1.0, 1.0, 1.0])
    write(tmp_path / "c", [4.0, 1.0, 1.0, 1.0])
    write(tmp_path / "d", [1.0, 6.0, 1.0, 1.0])
    out = merged(tmp_path, "multislerp", "cd", [{"weight": 3}, {"weight": 1}])
    close(out[q(0)], [1 + 3.5 * 3 / math.sqrt(10), 1 + 3.5 / math.sqrt(10), 1, 1])


def test_model_stock_follows_the_formula_past_the_base(models):
    cos = float(torch.nn.functional.cosine_similarity(A, B, dim=0))
    assert cos < 0
    close(merged(models, "model_stock", "ab")[NORM], BASE + 2 * cos / (1 + cos) * (A + B) / 2)
    rows = merged(models, "model_stock", "ab", filter_wise=True)[q(0)]
    for part in (slice(0, 2), slice(2, 4)):
        cos = torch.nn.functional.cosine_similarity(A[part], B[part], dim=0)
        close(rows[part], (BASE + 2 * cos / (1 + cos) * (A + B) / 2)[part])


@pytest.fixture
def wide(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
        model = {"w": torch.zeros(400, 50) if name == "base" else torch.randn(400, 50, generator=generator)}
        save_file(model, tmp_path / name / "model.safetensors")
    return tmp_path, model["w"]


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_masks_have_the_density_and_keep_the_l1_norm(method, wide):
    folder, tau = wide
    raw = recipe(folder, method, "a", [{"weight": 1.0, "density": 0.3}])
    notices = []
    out = bmm.merge_mergekit(raw, progress=lambda stage, done, total, text="": notices.append((stage, text)))["w"]
    kept = out != 0
    assert abs(float(kept.float().mean()) - 0.3) < 0.02
    torch.testing.assert_close(float(out.abs().sum()), float(tau.abs().sum()), rtol=1e-4, atol=0)
    assert float((out / tau)[kept].std()) < 1e-4
    small = tau.abs() < tau.abs().median()
    chance = float(kept[small].float().mean())
    if method.startswith("della"):
        assert 0.18 < chance < 0.26  # 0.3 - epsilon / 2 with the default of 0.15
    else:
        assert abs(chance - 0.3) < 0.02
    assert any(stage == "notice" and "another seed" in text for stage, text in notices)
    assert torch.equal(out, bmm.merge_mergekit(raw)["w"])
    assert not torch.equal(out, bmm.merge_mergekit(raw, seed=1)["w"])
    plain = bmm.merge_mergekit(raw | {"parameters": {"rescale": False}})["w"]
    assert torch.equal(plain, torch.where(kept, tau, 0.0))


# what is refused, and by which key


def broken(folder):
    """Recipes that are refused: what changes, and words of the error, the key path among them."""
    one = [{"weight": 1.0}]
    return {
        "method": (recipe(folder, "passthrough"), r"merge_method: 'passthrough' is not supported"),
        "no method": ({"models": []}, "merge_method: missing"),
        "base": (recipe(folder, "ties", base=""), "base_model: ties needs one"),
        "key": (recipe(folder, "ties") | {"dtpye": "float32"}, "unknown key 'dtpye'"),
        "chat": (recipe(folder, "ties") | {"chat_template": "chatml"}, "chat_template: not supported"),
        "modules": (recipe(folder, "ties") | {"modules": {}}, "modules: not supported"),
        "dtype": (recipe(folder, "ties") | {"dtype": "float8"}, "dtype: 'float8'"),
        "union": (recipe(folder, "ties") | {"tokenizer_source": "x/y"}, "tokenizer_source: 'x/y'"),
        "tokens": (recipe(folder, "ties") | {"tokenizer": {"source": "base", "tokens": {"a": {}}}}, "tokenizer.tokens"),
        "parameter": (recipe(folder, "ties", "a", [{"wieght": 1}]), r"models\[0\].parameters.wieght: no such"),
        "whole": (recipe(folder, "ties", "a", one, lamda=1), r"parameters.lamda: no such parameter"),
        "text": (recipe(folder, "ties", "a", [{"weight": "x"}]), r"models\[0\].parameters.weight: 'x' is no number"),
        "flag": (recipe(folder, "ties", "a", one, normalize=0.5), "parameters.normalize: 0.5 does not fit"),
        "filter": (
            recipe(folder, "ties", "a", [{"weight": [{"filter": "x", "values": 1}]}]),
            r"models\[0\].parameters.weight\[0\]: unknown key 'values'",
        ),
        "missing": (recipe(folder, "ties", "ab", one), r"models\[1\].parameters.weight: ties needs a weight for model"),
        "no t": (recipe(folder, "slerp", "ab", base="a"), "parameters.t: slerp needs a t"),
        "count": (recipe(folder, "slerp", "abc", base="a", t=1), "models: slerp merges exactly 2, not 3"),
        "zero": (recipe(folder, "linear", "ab", [{"weight": 1}, {"weight": -1}], base=""), "sum to 0"),
        "epsilon": (recipe(folder, "della", "a", [{"weight": 1, "density": 0.9}]), "density 0.9 with epsilon 0.15"),
        "nuslerp": (recipe(folder, "nuslerp", "ab", one * 2, base="", nuslerp_flatten=False), "nuslerp_flatten: false"),
        "adapter": (recipe(folder, "ties", ["a", "b+lora"]), r"models\[1\].model: .* adds an adapter"),
        "hub": (recipe(folder, "ties", ["a", "org/missing"], one * 2), r"models\[1\].model: no folder"),
        "twice": (recipe(folder, "ties", "aa"), r"models\[1\]: .* listed twice"),
        "slices": (
            {"merge_method": "linear", "slices": [{"sources": []}, {"sources": []}]},
            r"slices\[1\]: models assembled from several slices",
        ),
        "range": (
            {"merge_method": "linear", "slices": [{"sources": [{"model": "a", "layer_range": [1, 3]}]}]},
            r"slices\[0\].sources\[0\].layer_range: \[1, 3\] is not all layers",
        ),
        "layers": (
            {
                "merge_method": "linear",
                "parameters": {"weight": 1},
                "slices": [{"sources": [{"model": str(folder / "a"), "layer_range": [0, 2]}]}],
            },
            r"layer_range: 2 layers, the models have 3",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("case", sorted(broken(Path())))
def test_what_is_not_supported_is_refused_by_its_key(case, models):
    raw, words = broken(models)[case]
    with pytest.raises(RecipeError, match=words) as error:
        bmm.merge_mergekit(raw, out=models / "out")
    assert error.value.hint
    assert not (models / "out").exists()


def test_keys_are_refused_before_any_model_is_opened(tmp_path):
    raw = recipe(tmp_path / "nowhere", "ties", "a", [{"weight": 1, "dnsity": 1}])
    with pytest.raises(RecipeError, match=r"models\[0\]\.parameters\.dnsity"):
        bmm.merge_mergekit(raw)


@pytest.mark.parametrize("text", ["", "[1]", "a: [", "a: 1\n---\nb: 2", "models: 3", "\0"])
def test_files_that_are_no_recipe(text, tmp_path):
    (tmp_path / "c.yml").write_text(text)
    with pytest.raises(RecipeError, match=r"c\.yml"):
        MergekitConfig.load(tmp_path / "c.yml")


def test_what_has_no_effect_is_said(models):
    out = merged(models, "ties", "ab", [{"weight": 1, "epsilon": 0.1}], weight=1, int8_mask=True, t=0.5)
    assert [n.split(":")[0] for n in out["notices"]] == [
        "parameters.int8_mask changes nothing",
        "parameters.t is no parameter of ties there",
        "models[0].parameters.epsilon is no parameter of ties there",
    ]
