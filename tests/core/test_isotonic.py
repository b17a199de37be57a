import itertools

import numpy as np
import pytest

from shadowtune.core.calibration_metrics import expected_calibration_error, isotonic_fit, isotonic_values


def reference(labels):
    """The least squares rising sequence by the min-max formula (Robertson et al., 1988)."""
    count = len(labels)
    return [
        max(min(np.mean(labels[low : high + 1]) for high in range(index, count)) for low in range(index + 1))
        for index in range(count)
    ]


def test_it_is_the_least_squares_rising_function():
    for labels in itertools.product((0.0, 1.0), repeat=6):
        levels, values = isotonic_fit(np.linspace(0.1, 0.9, 6), labels)
        assert levels == pytest.approx(np.linspace(0.1, 0.9, 6))
        assert values == pytest.approx(reference(labels))


def test_equal_confidences_have_one_value_in_any_order():
    for labels in ([1, 0, 1], [0, 1, 1], [1, 1, 0]):
        levels, values = isotonic_fit([0.5, 0.5, 0.9], labels)
        assert len(levels) == len(values) == 2
    assert isotonic_fit([0.9, 0.5, 0.5], [1, 0, 1])[1] == pytest.approx([0.5, 1.0])


def test_an_overconfident_signal_is_calibrated():
    rng = np.random.default_rng(0)
    truth = rng.uniform(size=4000)
    labels = (rng.uniform(size=4000) < truth).astype(float)
    confident = truth**0.3
    fitted = isotonic_fit(confident[:2000], labels[:2000])
    values = isotonic_values(fitted, confident[2000:])
    assert expected_calibration_error(confident[2000:], labels[2000:]) > 0.2
    assert expected_calibration_error(values, labels[2000:]) < 0.04
    assert isotonic_values(fitted, [-1.0, 2.0]) == pytest.approx([fitted[1][0], fitted[1][-1]])
