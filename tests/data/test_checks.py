import pytest

from shadowtune.data.checks import check_encoded
from shadowtune.errors import DataError


def row(ids, labels=None, number=1):
    return {"input_ids": ids, "labels": ids if labels is None else labels, "row": number}


def refuse(rows, message, vocab_size=10, positions=None):
    with pytest.raises(DataError, match=message) as caught:
        check_encoded(rows, vocab_size, positions)
    assert "\n" not in str(caught.value)


def test_rows_that_fit_pass():
    check_encoded([row([1, 2, 9], [-100, -100, 9]), row([3, 0], 0)], vocab_size=10, max_positions=3)
    check_encoded([row([1] * 100)], vocab_size=10, max_positions=None)


def test_no_rows_are_refused():
    refuse([], "there are no rows")


def test_rows_without_labels_are_named_the_first_five():
    rows = [row([1, 2], number=number) for number in range(1, 4)]
    rows += [row([1, 2], [-100, -100], number=number) for number in range(4, 11)]
    refuse(rows, r"7 of 10 rows \(4, 5, 6, 7, 8, \.\.\.\) have no labels")
    refuse(rows[:4], r"1 of 4 rows \(4\) have no labels")


def test_a_label_on_the_first_token_alone_teaches_nothing():
    refuse([row([1, 2], [1, -100])], "have no labels")
    refuse([row([1])], "have no labels")


def test_class_zero_is_a_label():
    check_encoded([row([1], 0)], 10, None)


def test_tokens_beyond_the_vocabulary_are_refused():
    refuse(
        [row([1, 2]), row([1, 10], number=8)], r"1 of 2 rows \(8\) hold tokens beyond .* vocabulary of 10; use the tok"
    )


def test_rows_beyond_the_positions_are_refused_with_the_way_out():
    refuse(
        [row([1, 2, 3]), row([1] * 4, number=6)], r"\(6\) are longer than .* 3 positions; set data\.max_length=3", 10, 3
    )
