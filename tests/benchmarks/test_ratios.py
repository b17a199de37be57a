import pytest

from benchmarks.result_files import Ratio, pairwise_ratio, percentile


def test_rounds_are_divided_pair_by_pair_not_median_by_median():
    assert pairwise_ratio([2.0, 8.0, 30.0], [1.0, 16.0, 10.0]).ratio == 2.0  # 2, 0.5, 3; of the medians: 0.8


def test_a_drift_that_hits_both_of_a_pair_drops_out():
    assert pairwise_ratio([2.0, 4.0, 40.0], [1.0, 2.0, 20.0]) == Ratio(2.0, 2.0, 2.0, 3)


def test_the_spread_is_the_10th_and_the_90th_percentile():
    ratios = [float(value) for value in range(11)]
    assert pairwise_ratio(ratios, [1.0] * 11) == Ratio(ratio=5.0, ratio_low=1.0, ratio_high=9.0, n=11)


def test_one_round_has_no_spread():
    assert pairwise_ratio([3.0], [2.0]) == Ratio(1.5, 1.5, 1.5, 1)


def test_rounds_must_come_in_pairs():
    with pytest.raises(ValueError, match="shorter"):
        pairwise_ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.1, 1.3), (0.5, 2.5), (0.9, 3.7), (1.0, 4.0)])
def test_percentiles_are_interpolated_between_sorted_values(share, expected):
    assert percentile([4.0, 1.0, 3.0, 2.0], share) == pytest.approx(expected)
