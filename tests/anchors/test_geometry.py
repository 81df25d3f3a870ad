"""Merges by angle (Model Stock, SLERP, Multi-SLERP, Karcher mean) and by depth (LiNeS)."""

import math

import numpy as np
import pytest
import torch

from bmm.anchors import ANCHORS, get, merge
from bmm.anchors.sphere import Points, cosines_of, karcher_mean
from bmm.errors import MergeError

from .models import SHAPES, family

FLOATING = [name for name in SHAPES if name != "empty"]
PAIR = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]


def one(name, experts, base=None, **knobs):
    base = torch.zeros_like(experts[0]) if base is None else base
    return merge(name, {"w": base}, [{"w": w} for w in experts], **knobs)["w"]


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=tolerance, atol=tolerance)


def doubles(base, models, name):
    """(w0 (n,), experts (T, n)) of one tensor as float64 NumPy arrays."""
    return base[name].numpy().astype(np.float64).ravel(), np.stack(
        [m[name].numpy().astype(np.float64).ravel() for m in models]
    )


# -- Model Stock -------------------------------------------------------------------------------------------------------


def test_model_stock_by_hand():
    # Task vectors at 60 degrees: cos 1/2, t = 2 * 0.5 / 1.5 = 2/3 of the way to their mean.
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.5, math.sqrt(0.75)])
    close(one("model_stock", [a, b]), 2 / 3 * (a + b) / 2)
    # Orthogonal ones give the base, opposite ones too, identical ones the expert.
    base = torch.tensor([1.0, 2.0])
    assert torch.equal(one("model_stock", [base + PAIR[0], base + PAIR[1]], base), base)
    assert torch.equal(one("model_stock", [base + a, base - 0.5 * a], base), base)
    close(one("model_stock", [base + b, base + b, base + b], base), base + b)


@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize("experts", [2, 5])
def test_model_stock_against_numpy(per, experts):
    base, models = family(experts, seed=2)
    shared = {k: 0.1 * torch.randn(v.shape, generator=torch.Generator().manual_seed(9)) for k, v in base.items()}
    models = [{k: v + shared[k] if v.is_floating_point() else v for k, v in m.items()} for m in models]
    merged = merge("model_stock", base, models, per=per)
    for name in FLOATING:
        w0, w = doubles(base, models, name)
        rows = base[name].shape[0] if per == "row" and base[name].dim() > 1 else 1
        expected = []
        for part0, part in zip(w0.reshape(rows, -1), w.reshape(experts, rows, -1).transpose(1, 0, 2), strict=True):
            tau = part - part0
            unit = tau / np.linalg.norm(tau, axis=1, keepdims=True)
            cos = np.mean([unit[i] @ unit[j] for i in range(experts) for j in range(i)])
            t = experts * cos / (1 + (experts - 1) * cos) if cos > 0 else 0.0
            expected.append(t * part.mean(0) + (1 - t) * part0)
        close(merged[name].flatten(), np.concatenate(expected))


def test_an_expert_that_did_not_move_counts_as_orthogonal():
    a = torch.tensor([1.0, 1.0])
    # cosines 1 (a, a), 0, 0: mean 1/3, t = 3/3 / (1 + 2/3) = 0.6, times the mean 2/3 a
    close(one("model_stock", [a, a, torch.zeros(2)]), 0.6 * 2 / 3 * a)


# -- SLERP -------------------------------------------------------------------------------------------------------------


def test_slerp_by_hand():
    close(one("slerp", PAIR), [3 * math.sqrt(0.5), 4 * math.sqrt(0.5)])
    close(one("slerp", PAIR, t=1 / 3), [3 * math.sin(math.pi / 3), 4 * math.sin(math.pi / 6)])
    close(one("slerp", PAIR, t=0.0), PAIR[0])
    close(one("slerp", PAIR, t=1.0), PAIR[1])
    base = torch.tensor([1.0, 1.0])
    around = one("slerp", [base + p for p in PAIR], base, space="task_vectors")
    close(around - base, [3 * math.sqrt(0.5), 4 * math.sqrt(0.5)])


def numpy_slerp(a, b, t):
    na, nb = np.linalg.norm(a), np.linalg.norm(b)
    cos = (a / na) @ (b / nb)
    if abs(cos) > 0.9995:
        return (1 - t) * a + t * b
    phi = np.arccos(cos)
    return np.sin((1 - t) * phi) / np.sin(phi) * a + np.sin(t * phi) / np.sin(phi) * b


@pytest.mark.parametrize("space", ["weights", "task_vectors"])
@pytest.mark.parametrize("size", [0.001, 0.5, 3.0])
def test_slerp_against_numpy(space, size):
    base, models = family(2, seed=3, size=size)
    merged = merge("slerp", base, models, t=0.3, space=space)
    for name in FLOATING:
        w0, (a, b) = doubles(base, models, name)
        expected = numpy_slerp(a, b, 0.3) if space == "weights" else w0 + numpy_slerp(a - w0, b - w0, 0.3)
        close(merged[name].flatten(), expected)


def test_slerp_of_parallel_opposite_and_zero_vectors_is_a_line():
    a = torch.tensor([1.0, 2.0])
    close(one("slerp", [a, 3 * a], t=0.25), 1.5 * a)
    close(one("slerp", [a, -a], t=0.25), 0.5 * a)
    close(one("slerp", [a, torch.zeros(2)], t=0.25), 0.75 * a)


@pytest.mark.parametrize("experts", [1, 3])
def test_slerp_takes_two_experts(experts):
    base, models = family(experts)
    with pytest.raises(MergeError, match="takes exactly 2 experts") as error:
        merge("slerp", base, models)
    assert "karcher" in error.value.hint


# -- means on the sphere -----------------------------------------------------------------------------------------------


def test_means_on_the_sphere_by_hand():
    # Directions at right angles: the mean points at 45 degrees; its length is the mean of 3 and 4.
    for name in ("multi_slerp", "karcher"):
        close(one(name, PAIR), [3.5 * math.sqrt(0.5)] * 2)
    # On a circle the Karcher mean is the mean of the angles: 0, 0 and 90 degrees give 30.
    angles = one("karcher", [PAIR[0], PAIR[0], PAIR[1]])
    assert math.degrees(math.atan2(angles[1], angles[0])) == pytest.approx(30, abs=1e-4)
    assert angles.norm() == pytest.approx(10 / 3, abs=1e-5)
    weighted = one("karcher", PAIR, weights=[2.0, 1.0])
    close(weighted, angles)
    projected = one("multi_slerp", [PAIR[0], PAIR[0], PAIR[1]])
    assert math.degrees(math.atan2(projected[1], projected[0])) == pytest.approx(math.degrees(math.atan(0.5)), abs=1e-4)


def numpy_mean(points, shares, steps, log):
    """Tangent-space steps from the normalised weighted mean, on explicit vectors."""
    norms = np.linalg.norm(points, axis=1)
    unit = points / norms[:, None]
    m = shares @ unit
    m /= np.linalg.norm(m)
    for _ in range(steps):
        tangents = []
        for u in unit:
            dot = np.clip(u @ m, -1, 1)
            v, angle = u - dot * m, np.arccos(dot)
            tangents.append(v * (angle / np.sin(angle) if log and angle > 1e-9 else 1.0))
        step = shares @ np.array(tangents)
        length = np.linalg.norm(step)
        if length > 1e-14:
            m = np.cos(length) * m + np.sin(length) * step / length
    return m * (shares @ norms)


@pytest.mark.parametrize("space", ["weights", "task_vectors"])
@pytest.mark.parametrize(
    ("name", "knobs", "steps", "log"),
    [
        ("multi_slerp", {"tangent": "project"}, 1, False),
        ("multi_slerp", {"tangent": "log"}, 1, True),
        ("karcher", {"iterations": 100}, 100, True),
    ],
)
def test_means_on_the_sphere_against_numpy(name, knobs, steps, log, space):
    base, models = family(4, seed=5, size=0.6)
    weights = np.array([1.0, 2.0, 0.5, 1.5])
    merged = merge(name, base, models, weights=weights.tolist(), space=space, **knobs)
    for tensor in FLOATING:
        w0, w = doubles(base, models, tensor)
        if len(w0) < 4:
            continue  # on circles and lines experts are too far apart for one mean
        origin = w0 if space == "task_vectors" else 0 * w0
        expected = origin + numpy_mean(w - origin, weights / weights.sum(), steps, log)
        close(merged[tensor].flatten(), expected)


def test_the_solver_reports_what_it_did():
    cosines = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    rough = karcher_mean(cosines, torch.ones(3), iterations=0)
    fine = karcher_mean(cosines, torch.ones(3), tolerance=1e-7, iterations=50)
    assert (rough.iterations, rough.residual > 0.05) == (0, True)
    assert fine.residual <= 1e-7
    assert 0 < fine.iterations < 10
    assert float(fine.coefficients @ cosines @ fine.coefficients) == pytest.approx(1)
    assert karcher_mean(-torch.ones(2, 2).double() + 2 * torch.eye(2), torch.ones(2)).coefficients is None


def test_directions_that_cancel_are_averaged():
    a = torch.tensor([2.0, 1.0])
    for name in ("multi_slerp", "karcher"):
        close(one(name, [a, -0.5 * a]), 0.25 * a)
        close(one(name, [torch.zeros(2), torch.zeros(2)]), torch.zeros(2))
        close(one(name, [a, torch.zeros(2)]), 0.5 * a)  # a zero vector has no direction, but a length


def test_two_experts_of_one_length_agree_on_the_middle_of_the_arc():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 50, generator=generator)
    b = b * a.norm() / b.norm()
    middle = one("slerp", [a, b])
    # A point inside the sphere for SLERP of unequal lengths; on it here.
    close(one("karcher", [a, b]), middle)
    close(one("multi_slerp", [a, b]), middle)
    close(middle.norm(), a.norm())


def test_small_changes_keep_their_digits():
    """Experts 1e-4 from a base of size 1: the task vector of the mean is right to 1e-4 of itself, in float32."""
    base, models = family(3, seed=6, size=1e-4)
    merged = merge("karcher", base, models)
    w0, w = doubles(base, models, "linear.weight")
    expected = numpy_mean(w, np.full(3, 1 / 3), 20, True) - w0
    got = merged["linear.weight"].double().flatten() - base["linear.weight"].double().flatten()
    assert (got - torch.from_numpy(expected)).abs().max() < 4e-7  # the rounding of the merged weights themselves


def test_inner_products_do_not_depend_on_the_chunk(monkeypatch):
    taus = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1))
    parts = [(torch.zeros(1000), taus)]
    whole = Points.of(parts, "weights").cosines
    monkeypatch.setattr("bmm.anchors.sphere.CHUNK", 7)
    torch.testing.assert_close(Points.of(parts, "weights").cosines, whole, rtol=0, atol=1e-14)
    assert torch.equal(cosines_of(torch.zeros(2, 2).double()), torch.zeros(2, 2).double())


# -- LiNeS -------------------------------------------------------------------------------------------------------------


def blocks(experts=3, seed=0):
    names = ["embed.weight", *(f"blocks.{i}.fc.weight" for i in range(5)), "head.weight"]
    generator = torch.Generator().manual_seed(seed)
    base = {n: torch.randn(4, 3, generator=generator) for n in names}
    return base, [{n: w + torch.randn(4, 3, generator=generator) for n, w in base.items()} for _ in range(experts)]


DEPTHS = {"embed.weight": 0.0, **{f"blocks.{i}.fc.weight": i / 4 for i in range(5)}, "head.weight": 1.0}


@pytest.mark.parametrize("inner", ["task_arithmetic", "tsv", "ties"])
def test_lines_is_the_inner_merge_times_a_line_in_depth(inner):
    base, models = blocks()
    plain = merge(inner, base, models, scale=1.0)
    scaled = merge(f"{inner}+lines", base, models, lines_unit="one", lines_alpha=0.25, lines_beta=0.5, scale=0.8)
    for name, depth in DEPTHS.items():
        close(scaled[name] - base[name], 0.8 * (0.25 + 0.5 * depth) * (plain[name] - base[name]))


@pytest.mark.parametrize("inner", ["task_arithmetic", "ties"])
def test_the_published_alpha_is_a_ratio_of_norms(inner):
    base, models = blocks()
    plain = merge(inner, base, models, scale=1.0)
    merged = merge(f"{inner}+lines", base, models)
    wide = {n: np.stack([m[n].double().numpy() - base[n].double().numpy() for m in models]) for n in base}
    summed = sum(np.abs(wide[n].sum(0)).sum() for n in base)
    alpha = summed / (3 * sum(float((plain[n] - base[n]).double().abs().sum()) for n in base))
    if inner == "task_arithmetic":
        assert alpha == pytest.approx(1 / 3, rel=1e-5)
    beta = ANCHORS[inner].linear.default
    for name, depth in DEPTHS.items():
        close(merged[name] - base[name], (alpha + beta * depth) * (plain[name] - base[name]))
    outside = merge(f"{inner}+lines", base, models, lines_outside="first")
    close(outside["head.weight"] - base["head.weight"], alpha * (plain["head.weight"] - base["head.weight"]))
    assert torch.equal(outside["blocks.4.fc.weight"], merged["blocks.4.fc.weight"])


def test_the_scale_does_not_enter_the_ratio():
    base, models = blocks()
    one, half = (merge("task_arithmetic+lines", base, models, scale=s) for s in (1.0, 0.5))
    for name in base:
        close(half[name] - base[name], (one[name] - base[name]) / 2)


def test_lines_rows_carry_the_inner_methods_knobs_needs_and_limits():
    row, inner = get("regmean+lines"), get("regmean")
    assert row.name == "regmean+lines"
    assert [k.name for k in row.knobs] == [
        *(k.name for k in inner.knobs), "lines_alpha", "lines_beta", "lines_unit", "lines_outside",
    ]  # fmt: skip
    assert row.needs == inner.needs
    assert row.wrapped is inner
    assert row.paper.startswith("2410.17146, ")
    assert get("task_arithmetic+lines").defaults["lines_beta"] == 0.3
    assert get("task_arithmetic+lines").defaults["scale"] == 1.0
    assert get("slerp+lines").experts == (2, 2)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tvs+lines", "tsv+lines"),
        ("tsv+line", "tsv+lines"),
        ("tsv+lines+lines", "tsv+lines"),
        ("lines", "METHOD+lines"),
        ("tsv+", "tsv+lines"),
    ],
)
def test_unknown_wrappers_are_answered_with_the_closest(name, hint):
    with pytest.raises(MergeError, match="no anchor is called") as error:
        get(name)
    assert hint in error.value.hint
