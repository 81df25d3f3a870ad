"""Likelihood, calibration error and temperature against numbers worked out by hand."""

import math

import pytest
import torch

from bmm.evaluation.calibration import (
    COLDEST,
    accuracy,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    tempered,
)


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def test_accuracy_and_likelihood_by_hand():
    p, labels = logs([0.7, 0.2, 0.1], [0.5, 0.25, 0.25], [0.1, 0.1, 0.8]), torch.tensor([0, 1, 2])
    assert accuracy(p, labels) == pytest.approx(2 / 3)
    assert negative_log_likelihood(p, labels) == pytest.approx(-(math.log(0.7) + math.log(0.25) + math.log(0.8)) / 3)


def test_calibration_error_by_hand():
    # Confidences 0.61 and 0.65 share bin (9/15, 10/15], 0.92 is in (13/15, 14/15], 1.0 in the last.
    p = logs([0.61, 0.39], [0.65, 0.35], [0.08, 0.92], [1.0, 0.0])
    labels = torch.tensor([0, 1, 1, 1])
    shared = abs((1 - 0.61) + (0 - 0.65))
    assert expected_calibration_error(p, labels) == pytest.approx((shared + abs(1 - 0.92) + 1.0) / 4)
    assert expected_calibration_error(p, labels, bins=1) == pytest.approx(abs(2 - (0.61 + 0.65 + 0.92 + 1)) / 4)


def test_a_confidence_on_an_edge_belongs_below_it():
    # 0.6 = 9/15 closes bin 9; 0.6 + a little is alone in bin 10, so the two do not cancel.
    p, labels = logs([0.6, 0.4], [0.601, 0.399]), torch.tensor([0, 1])
    assert expected_calibration_error(p, labels) == pytest.approx((0.4 + 0.601) / 2)


def test_certainty_that_is_right_is_calibrated():
    p = logs([1.0, 0.0], [0.0, 1.0])
    assert expected_calibration_error(p, torch.tensor([0, 1])) == 0
    assert expected_calibration_error(p, torch.tensor([1, 0])) == 1
    assert negative_log_likelihood(p, torch.tensor([1, 0])) == math.inf


def test_tempering_log_probabilities_is_tempering_logits():
    logits = 5 * torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(tempered(logits.log_softmax(-1), 2.5), (logits / 2.5).log_softmax(-1))
    torch.testing.assert_close(tempered(logits.log_softmax(-1), 1.0), logits.log_softmax(-1))


@pytest.mark.parametrize("truth", [0.4, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(truth):
    g = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(20_000, 5, generator=g, dtype=torch.float64)
    labels = (logits / truth).softmax(-1).multinomial(1, generator=g).squeeze(1)
    found = fit_temperature(logits.log_softmax(-1), labels)
    assert found == pytest.approx(truth, rel=0.05)
    around = [negative_log_likelihood(tempered(logits.log_softmax(-1), found * k), labels) for k in (0.98, 1.0, 1.02)]
    assert around[1] == min(around)


def test_temperatures_at_the_limits():
    right = logs([0.6, 0.4], [0.4, 0.6])
    assert fit_temperature(right, torch.tensor([0, 1])) == pytest.approx(COLDEST, rel=0.01)
    flat = logs([0.5, 0.5], [0.5, 0.5])
    assert fit_temperature(flat, torch.tensor([0, 1])) == 1.0
