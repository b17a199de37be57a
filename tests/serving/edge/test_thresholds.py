import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowtune.config.serving import HIGHEST_THRESHOLD
from shadowtune.errors import ShadowtuneError
from shadowtune.serving.edge.confidence import Signals
from shadowtune.serving.edge.thresholds import (
    CalibrationExample,
    CalibrationTarget,
    area,
    at_threshold,
    choose_threshold,
    confidences,
    deferral_curve,
    oracle_area,
    random_area,
    thinned,
)
from tests.support.properties import property_test


def row(sure, edge, cloud, cost=1.0, tagged=False):
    return CalibrationExample(Signals(sure, sure, sure, sure, 2), tagged, edge, cloud, cost)


def points_of(rows):
    return deferral_curve(rows, confidences(rows, "logprob"))


MANY = 10**9
"""Rows with which a standard error is nothing."""
KNOWN = [row(0.1, 0, 1), row(0.2, 0, 1), row(0.6, 1, 0), row(0.8, 1, 1)]
"""Best of all: defer the first two, accuracy 1."""


def test_the_curve_of_a_known_case():
    found = [(point.accuracy, point.deferral_rate, point.cost) for point in points_of(KNOWN)]
    assert found == [(0.5, 0, 0), (0.75, 0.25, 0.25), (1.0, 0.5, 0.5), (0.75, 0.75, 0.75), (0.75, 1, 1)]


def test_areas_of_a_known_case():
    assert area(points_of(KNOWN)) == pytest.approx((0.625 + 0.875 + 0.875 + 0.75) / 4)
    assert random_area(KNOWN) == pytest.approx((0.5 + 0.75) / 2)
    assert oracle_area(KNOWN) == pytest.approx((0.625 + 0.875 + 1.0 + 0.875) / 4)


def test_the_threshold_is_chosen_that_reaches_the_aim_best():
    points = points_of(KNOWN)
    assert choose_threshold(points, CalibrationTarget("accuracy", 1.0), MANY).deferral_rate == 0.5
    assert choose_threshold(points, CalibrationTarget("accuracy", 0.7), MANY).deferral_rate == 0.25
    assert choose_threshold(points, CalibrationTarget("accuracy", 0.5), MANY).deferral_rate == 0
    assert choose_threshold(points, CalibrationTarget("deferral-rate", 0.3), MANY).accuracy == 0.75
    assert choose_threshold(points, CalibrationTarget("deferral-rate", 1.0), MANY).accuracy == 1.0
    assert choose_threshold(points, CalibrationTarget("cost", 0.3), MANY).accuracy == 0.75
    assert choose_threshold(points, CalibrationTarget("cost", 0.0), MANY).deferral_rate == 0


def test_what_is_allowed_is_used_unless_that_is_clearly_worse():
    points = points_of(KNOWN)
    few, many = (choose_threshold(points, CalibrationTarget("deferral-rate", 0.3), rows) for rows in (1, MANY))
    assert few.deferral_rate == many.deferral_rate == 0.25
    worse = points_of([row(0.1, 0, 1), *[row(0.2 + n / 100, 0.9, 0.8) for n in range(9)]])
    assert choose_threshold(worse, CalibrationTarget("deferral-rate", 0.5), 10).deferral_rate == 0.5
    assert choose_threshold(worse, CalibrationTarget("deferral-rate", 0.5), MANY).deferral_rate == 0.1


def test_dear_requests_count_by_their_cost():
    rows = [row(0.1, 0, 1, cost=10), row(0.2, 0, 1, cost=1), row(0.9, 1, 1, cost=1)]
    assert [point.cost for point in points_of(rows)] == pytest.approx([0, 10 / 3, 11 / 3, 4])
    assert choose_threshold(points_of(rows), CalibrationTarget("cost", 3.0), MANY).deferral_rate == 0


@pytest.mark.parametrize(
    ("rows", "target", "said"),
    [
        (KNOWN[:1] * 3, CalibrationTarget("accuracy", 1.0), None),
        (
            [row(0.5, 0, 0)] * 3,
            CalibrationTarget("accuracy", 0.5),
            r"accuracy 0\.5: the best is 0\.0000, deferring 0\.0%",
        ),
        ([row(0.5, 0, 1), row(0.5, 1, 0)], CalibrationTarget("accuracy", 0.9), r"the best is 0\.5000"),
        (
            [row(0.5, 0, 1, 4.0, True), row(0.5, 1, 1)],
            CalibrationTarget("deferral-rate", 0.4),
            r"tag alone comes to 0\.5",
        ),
        ([row(0.5, 0, 1, 4.0, True), row(0.5, 1, 1)], CalibrationTarget("cost", 1.0), "tag alone comes to 2"),
    ],
)
def test_an_aim_out_of_reach_is_refused_with_what_can_be_had(rows, target, said):
    if said is None:
        assert choose_threshold(points_of(rows), target, MANY).deferral_rate == 1
        return
    with pytest.raises(ShadowtuneError, match=said) as caught:
        choose_threshold(points_of(rows), target, MANY)
    assert "\n" not in str(caught.value)


def test_the_equally_sure_go_together():
    points = points_of([row(0.5, 0, 1), row(0.5, 1, 0), row(0.7, 1, 1)])
    assert [point.deferral_rate for point in points] == pytest.approx([0, 2 / 3, 1])


def test_all_right_needs_no_cloud_and_all_wrong_all_of_it():
    right, wrong = [row(0.1 * n, 1, 1) for n in range(1, 9)], [row(0.1 * n, 0, 1) for n in range(1, 9)]
    assert choose_threshold(points_of(right), CalibrationTarget("accuracy", 1.0), MANY).deferral_rate == 0
    assert choose_threshold(points_of(wrong), CalibrationTarget("accuracy", 1.0), MANY).deferral_rate == 1
    assert area(points_of(right)) == 1
    assert area(points_of(wrong)) == random_area(wrong) == oracle_area(wrong) == 0.5


def test_one_row_has_two_thresholds():
    assert [point.deferral_rate for point in points_of([row(1.0, 0, 1)])] == [0, 1]


def test_the_tag_goes_whatever_the_threshold():
    rows = [row(0.9, 0, 1, tagged=True), row(0.3, 1, 1), row(0.0, 1, 1)]
    points = points_of(rows)
    assert points[0].threshold < 0
    able = [point for point in points if point.threshold >= 0]
    assert [point.deferral_rate for point in able] == pytest.approx([1 / 3, 2 / 3, 1])
    assert choose_threshold(points, CalibrationTarget("accuracy", 1.0), MANY).deferral_rate == pytest.approx(1 / 3)


ROWS = st.lists(
    st.builds(
        row,
        st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0]),
        st.sampled_from([0.0, 0.5, 1.0]),
        st.sampled_from([0.0, 1.0]),
        st.floats(0, 10),
        st.booleans(),
    ),
    min_size=1,
    max_size=20,
)


@property_test
@given(ROWS)
def test_every_point_is_what_its_threshold_comes_to(rows):
    sure = confidences(rows, "margin")
    points = deferral_curve(rows, sure)
    assert [point.threshold for point in points] == sorted(point.threshold for point in points)
    for point in points:
        plain = at_threshold(rows, sure, point.threshold)
        assert (point.accuracy, point.deferral_rate, point.cost) == pytest.approx(
            (plain.accuracy, plain.deferral_rate, plain.cost)
        )
        assert point.threshold < HIGHEST_THRESHOLD
    assert (points[0].deferral_rate, points[-1].deferral_rate) == (0, 1)


@property_test
@given(ROWS)
def test_no_confidence_beats_the_oracle(rows):
    assert area(points_of(rows)) <= oracle_area(rows) + 1e-9
    assert random_area(rows) <= oracle_area(rows) + 1e-9


def test_random_confidences_have_the_random_area():
    draw = random.Random(0)
    rows = [row(draw.random(), float(draw.random() < 0.6), float(draw.random() < 0.9)) for _ in range(4000)]
    assert area(points_of(rows)) == pytest.approx(random_area(rows), abs=0.02)


def test_a_thinned_curve_keeps_both_ends_and_the_chosen_point():
    points = points_of([row(n / 1000, n % 2, 1) for n in range(1000)])
    kept = points[123]
    thin = thinned(points, kept, 50)
    assert len(thin) <= 50
    assert {points[0], kept, points[-1]} <= set(thin)
    assert all(a.threshold < b.threshold for a, b in itertools.pairwise(thin))
    assert thinned(points[:10], points[3], 50) == tuple(points[:10])
