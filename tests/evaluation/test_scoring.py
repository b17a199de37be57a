import pytest

from shadowtune.evaluation.scoring import accuracy_interval, exact_match, normalize


@pytest.mark.parametrize(
    ("prediction", "target", "same"),
    [
        ("pay bill", "pay bill", True),
        (" Pay  bill.", "pay bill", True),
        ("pay\nbill", "pay bill", True),
        ("pay bills", "pay bill", False),
        ("", "pay bill", False),
        ("bill pay", "pay bill", False),
    ],
)
def test_exact_match_forgives_case_space_and_a_full_stop_only(prediction, target, same):
    assert exact_match([prediction], [target]) == [same]


def test_exact_match_refuses_lists_of_other_lengths():
    with pytest.raises(ValueError, match="longer"):
        exact_match(["a"], ["a", "b"])


def test_normalize_drops_one_full_stop():
    assert normalize("Wait...") == "wait.."


def test_interval_agrees_with_published_values():
    # Wilson, 1927; e.g. Newcombe 1998, table I: 81/263 -> 0.2553 to 0.3662
    low, high = accuracy_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (5, 10), (0, 0)])
def test_interval_holds_the_share_and_stays_within_0_and_1(correct, total):
    low, high = accuracy_interval(correct, total)
    assert 0 <= low <= (correct / total if total else 0.5) <= high <= 1
