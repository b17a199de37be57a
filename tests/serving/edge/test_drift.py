import logging
import random
from dataclasses import replace

import pytest

from shadowtune.config.serving import CurvePoint, DriftConfig, PolicyConfig
from shadowtune.errors import ConfigError
from shadowtune.serving.edge.drift import RATIOS, DriftDetector, DriftMonitor, calibrated_rate

CURVE = tuple(
    CurvePoint(threshold, 0.9, rate, 5.0, corrections)
    for threshold, rate, corrections in ((0.0, 0.0, 0.0), (0.4, 0.1, 0.06), (0.6, 0.2, 0.1), (1.0000005, 1.0, 0.3))
)
POLICY = PolicyConfig(threshold=0.6, curve=CURVE, examples=1000)


def request(draw, out_of_scope, deferred=0.2, corrected=0.5):
    """Whether one request is corrected: in scope 20 % are deferred, half of these corrected; out of it nearly all."""
    if draw.random() < out_of_scope:
        deferred, corrected = 0.95, 0.95
    return draw.random() < deferred * corrected


def delay(seed, shift, warm=300, limit=3000, **rates):
    """Requests from the shift to the alarm; the requests before it raise none."""
    draw, monitor = random.Random(seed), DriftMonitor(POLICY)
    for _ in range(warm):
        monitor.observe(request(draw, 0.0), True)
    before = monitor.alarms
    for number in range(1, limit + 1):
        monitor.observe(request(draw, shift, **rates), True)
        if monitor.alarms > before:
            return number
    return limit


def test_false_alarms_come_at_most_once_in_two_thousand_requests():
    draw, detector = random.Random(0), DriftDetector(0.1, 2000.0)
    alarms = sum(detector.update(draw.random() < 0.1) for _ in range(100_000))
    assert alarms <= 50
    assert alarms > 1  # the bound is not idle


def test_a_shift_of_a_fifth_out_of_scope_is_found_within_two_hundred_requests():
    delays = [delay(seed, 0.2) for seed in range(60)]
    assert sorted(delays)[56] <= 200  # in 95 % of the runs
    assert sum(delays) / len(delays) < 120


def test_a_cloud_that_runs_another_model_is_found():
    delays = [delay(seed, 0.0, corrected=1.0) for seed in range(40)]  # every deferred answer is another one now
    assert sorted(delays)[20] <= 300


def test_the_statistic_is_that_of_the_definition():
    draw = random.Random(3)
    outcomes = [draw.random() < 0.3 for _ in range(40)]
    detector, p = DriftDetector(0.1, 1e12), 0.1
    for outcome in outcomes:
        detector.update(outcome)
    expected = 0.0
    for ratio in RATIOS:
        q = p + ratio * (1 - p)
        for start in range(len(outcomes)):
            product = 1.0
            for outcome in outcomes[start:]:
                product *= q / p if outcome else (1 - q) / (1 - p)
            expected += product / len(RATIOS)
    assert detector.evidence * 1e12 == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({}, 0.1),
        ({"threshold": 0.3}, 0.06),
        ({"threshold": 1.0}, 0.3),
        ({"kind": "verify"}, 0.3),
        ({"kind": "tag"}, 0.0),
        ({"kind": "always-edge"}, None),
        ({"examples": 0}, None),
        ({"curve": (CurvePoint(0.5, 0.5, 0.5, 0.5),)}, None),
    ],
)
def test_the_expected_rate_is_that_of_the_threshold(changes, rate):
    assert calibrated_rate(replace(POLICY, **changes)) == rate


def test_without_calibration_the_first_requests_say_what_is_expected():
    monitor = DriftMonitor(PolicyConfig(drift=DriftConfig(warm_up=50)))
    for number in range(50):
        assert monitor.status().expected is None
        monitor.observe(number % 5 == 0, False)
    status = monitor.status()
    assert status.expected == 0.2 < status.bound
    while not monitor.alarms:
        monitor.observe(True, False)
    assert monitor.status().alarmed


def test_samples_do_not_count_against_a_rate_of_greedy_answers():
    monitor = DriftMonitor(POLICY)
    for _ in range(500):
        monitor.observe(True, False)
    assert (monitor.alarms, monitor.status().requests) == (0, 0)


def test_an_alarm_is_logged_and_stays_until_the_threshold_changes(caplog):
    monitor = DriftMonitor(POLICY)
    with caplog.at_level(logging.WARNING, "shadowtune.serving"):
        while not monitor.alarms:
            monitor.observe(True, True)
    assert "run shadowtune calibrate again" in caplog.text and "10.0 % in calibration" in caplog.text
    monitor.observe(False, True)
    assert monitor.status().alarmed
    monitor.set_policy(replace(POLICY, threshold=0.4))
    status = monitor.status()
    assert (status.alarmed, status.alarms, status.expected, status.evidence) == (False, 1, 0.06, 0.0)


def test_it_can_be_switched_off_and_its_settings_have_bounds():
    monitor = DriftMonitor(replace(POLICY, drift=DriftConfig(enabled=False)))
    for _ in range(300):
        monitor.observe(True, True)
    assert monitor.alarms == 0
    with pytest.raises(ConfigError, match="false_alarm_interval"):
        DriftConfig(false_alarm_interval=0)
