import pytest

from shadowtune.data.encoding import check_encoded, check_tokenizer
from shadowtune.errors import DataError
from tests.support.tokenizers import tiny_tokenizer


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


def beyond(tokens, pad=None):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<new{index}>" for index in range(tokens)])
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
    return tokenizer


def test_a_tokenizer_that_the_model_has_rows_for_passes():
    check_tokenizer(tiny_tokenizer(), len(tiny_tokenizer()))
    check_tokenizer(tiny_tokenizer(), 97)


def test_a_tokenizer_larger_than_the_model_is_refused_with_what_to_do():
    size = len(tiny_tokenizer())
    with pytest.raises(
        DataError, match=rf"tokens up to id {size + 1}, .*ends at {size - 1}; .*resize_token_embeddings"
    ):
        check_tokenizer(beyond(2), size)


def test_a_pad_token_beyond_the_embedding_is_named():
    size = len(tiny_tokenizer())
    with pytest.raises(DataError, match=rf"pad token '<pad2>' has id {size}, .*such as the end token '<\|im_end\|>'"):
        check_tokenizer(beyond(0, pad="<pad2>"), size)
