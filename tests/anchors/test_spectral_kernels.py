"""TSV and Iso by hand and against their formulas."""

import numpy as np
import pytest
import torch

from bmm.anchors.iso import iso_c, iso_cts
from bmm.anchors.tsv import tsv, whiten
from tests.anchors.kernels import SHAPES, assert_close, at, from_zero, random_taus


def polar(matrix):
    p, _, qh = np.linalg.svd(matrix, full_matrices=False)
    return p @ qh


def reference_tsv(taus):
    rank = max(1, min(taus.shape[1:]) // len(taus))
    parts = [np.linalg.svd(tau, full_matrices=False) for tau in taus]
    u = np.concatenate([u[:, :rank] for u, _, _ in parts], 1)
    s = np.concatenate([s[:rank] for _, s, _ in parts])
    v = np.concatenate([vh[:rank].T for _, _, vh in parts], 1)
    return polar(u) @ np.diag(s) @ polar(v).T


def reference_iso_cts(taus, share):
    slots = min(taus.shape[1:])
    own = min(round((1 - share) * slots / len(taus)), slots // len(taus))
    common = slots - own * len(taus)
    u, s, vh = np.linalg.svd(taus.sum(0), full_matrices=False)
    us, ss, vs = [u[:, :common]], [s[:common]], [vh[:common].T]
    for tau in taus:
        uc = us[0]
        u, s, vh = np.linalg.svd(tau - uc @ uc.T @ tau, full_matrices=False)
        us, ss, vs = [*us, u[:, :own]], [*ss, s[:own]], [*vs, vh[:own].T]
    return np.concatenate(ss).mean() * polar(np.concatenate(us, 1)) @ polar(np.concatenate(vs, 1)).T


def test_tsv_by_hand():
    """Orthogonal leading directions stay as they are; what is beyond each task's rank is left out."""
    assert_close(from_zero("tsv", [[3, 0], [0, 1]], [[0, 0], [0, 2]]), [[3, 0], [0, 2]])
    assert_close(from_zero("tsv", [[3, 0], [0, 1]]), [[3, 0], [0, 1]])


@pytest.mark.parametrize("shape", [*SHAPES, (9, 4, 6), (33, 5, 3), (5, 1, 8), (4, 8, 1)])
def test_tsv_matches_its_formula(shape):
    taus = random_taus(shape)
    assert_close(tsv(taus, at(taus)), reference_tsv(taus.double().numpy()), 2e-5)


def test_whitening_gives_orthonormal_columns_or_rows():
    tall, wide = random_taus((9, 4)), random_taus((4, 9))
    assert_close(whiten(tall, tall.dtype).mT @ whiten(tall, tall.dtype), np.eye(4))
    assert_close(whiten(wide, wide.dtype) @ whiten(wide, wide.dtype).mT, np.eye(4))
    twice = torch.cat([tall[:, :1], tall[:, :1]], 1)  # dependent: one direction shared by two columns
    assert_close(whiten(twice, twice.dtype), torch.cat([tall[:, :1]] * 2, 1) / (2**0.5 * tall[:, :1].norm()))


@pytest.mark.parametrize("kernel", [tsv, iso_c, lambda taus, context: iso_cts(taus, context, common_share=0.5)])
def test_low_rank_task_vectors_stay_within_their_spans(kernel):
    """LoRA experts: the merged task vector has no rank that the experts do not have."""
    left, right = random_taus((3, 20, 2), 1, 1.0), random_taus((3, 2, 16), 2, 1.0)
    d = kernel(left @ right, at(left @ right))
    assert int(torch.linalg.matrix_rank(d, rtol=1e-4)) <= 6
    columns = torch.linalg.qr(torch.cat(list(left), 1)).Q
    assert (d - columns @ (columns.mT @ d)).norm() < 1e-4 * d.norm()


def test_iso_c_by_hand():
    assert_close(from_zero("iso_c", [[3, 0], [0, 1]], [[1, 0], [0, 1]]), [[3, 0], [0, 3]])


def test_iso_c_keeps_the_nuclear_norm_of_a_low_rank_sum():
    taus = random_taus((3, 20, 2), 1, 1.0) @ random_taus((3, 2, 16), 2, 1.0)
    d = iso_c(taus, at(taus))
    assert float(torch.linalg.matrix_norm(d, "nuc")) == pytest.approx(
        float(torch.linalg.matrix_norm(taus.sum(0), "nuc")), rel=1e-5
    )


@pytest.mark.parametrize("shape", [*SHAPES, (5, 1, 8)])
def test_iso_c_matches_its_formula(shape):
    taus = random_taus(shape)
    u, s, vh = np.linalg.svd(taus.double().numpy().sum(0), full_matrices=False)
    assert_close(iso_c(taus, at(taus)), s.mean() * u @ vh, 2e-5)


def test_iso_cts_by_hand():
    """Four slots, half of them common (5 and 4 of the sum), one each for the tasks (2 and 1): mean 3."""
    first, second = np.diag([5.0, 0, 2, 0]), np.diag([0.0, 4, 0, 1])
    assert_close(from_zero("iso_cts", first, second, common_share=0.5), 3 * np.eye(4))


@pytest.mark.parametrize("shape", [(2, 10, 10), (3, 12, 20), (4, 20, 12), (7, 10, 12)])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 1.0])
def test_iso_cts_matches_its_formula(shape, share):
    taus = random_taus(shape)
    reference = reference_iso_cts(taus.double().numpy(), share)
    assert_close(iso_cts(taus, at(taus), common_share=share), reference, 5e-5)


def test_iso_cts_is_iso_c_without_own_slots_or_with_one_expert():
    taus = random_taus((3, 8, 9))
    assert_close(iso_cts(taus, at(taus), common_share=1.0), iso_c(taus, at(taus)))
    assert_close(iso_cts(taus[:1], at(taus[:1]), common_share=0.5), iso_c(taus[:1], at(taus[:1])))
