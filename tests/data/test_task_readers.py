import pytest

from shadowtune.config.data import RowSource, TaskConfig
from shadowtune.data.task import read_fields
from shadowtune.errors import DataError


def read(row, **settings):
    task = TaskConfig("t", "{text}", "{answer}", RowSource("data"), **settings)
    return read_fields(row, task, "line 7")


def test_fields_are_taken_as_they_are_unless_renamed():
    row = {"text": "a", "label_text": "b", "n": [1]}
    assert read(row) == row
    assert read(row, rename={"label_text": "answer", "absent": "x"}) == {"text": "a", "answer": "b", "n": [1]}


def test_long_texts_lose_their_end_and_nothing_else_is_cut():
    assert read({"text": "abcdef", "n": 123456, "l": [1, 2, 3, 4]}, max_characters=3) == {
        "text": "abc",
        "n": 123456,
        "l": [1, 2, 3, 4],
    }


@pytest.mark.parametrize(
    ("value", "number", "words"), [(0, 0, "pay bill"), ("pay_bill", 0, "pay bill"), (1, 1, "none"), ("oos", 1, "none")]
)
def test_a_class_is_a_number_and_words_whether_it_was_a_number_or_a_name(value, number, words):
    fields = read({"intent": value}, labels=["pay_bill", "oos"], label_field="intent", label_words={"oos": "none"})
    assert fields == {"intent": value, "label": number, "label_name": words}


@pytest.mark.parametrize("value", [2, -1, "pay_bil", True, 0.0, None, ["oos"]])
def test_a_class_that_is_none_of_the_labels_is_named_with_its_row(value):
    with pytest.raises(DataError, match=r"^line 7: intent is .* none of the 2 labels of task t"):
        read({"intent": value}, labels=["pay_bill", "oos"], label_field="intent")


def test_the_nearest_label_is_suggested():
    with pytest.raises(DataError, match=r"did you mean pay_bill\?"):
        read({"label": "pay_bil"}, labels=["pay_bill", "oos"])


@pytest.mark.parametrize("answers", [["red", "is red"], {"text": ["red", "is red"], "answer_start": [6, 3]}])
def test_a_squad_row_has_its_first_answer_and_all_of_them(answers):
    fields = read({"context": "c", "answers": answers}, reader="squad")
    assert fields == {"context": "c", "answer": "red", "answers": ["red", "is red"]}


@pytest.mark.parametrize("answers", [[], {"text": [], "answer_start": []}])
def test_a_squad_row_without_answers_is_unanswerable(answers):
    fields = read({"answers": answers}, reader="squad")
    assert fields == {"answer": "unanswerable", "answers": ["unanswerable"]}


def test_an_mmlu_row_has_its_choices_by_letter_and_the_letter_of_the_right_one():
    fields = read({"choices": ["w", "x", "y", "z"], "answer": 2}, reader="mmlu")
    assert (fields["A"], fields["B"], fields["C"], fields["D"]) == ("w", "x", "y", "z")
    assert fields["letter"] == "C"


@pytest.mark.parametrize(
    ("reader", "row", "said"),
    [
        ("squad", {"answers": "red"}, "answers must be a list of texts"),
        ("squad", {"answers": [1]}, "answers must be a list of texts"),
        ("squad", {"answers": {"start": 1}}, "answers must be a list of texts"),
        ("squad", {"answer": []}, "no field 'answers'"),
        ("mmlu", {"choices": ["a", "b", "c"], "answer": 0}, "choices must be a list of 4"),
        ("mmlu", {"choices": ["a", "b", "c", "d"], "answer": 4}, "answer must be the number of a choice, from 0 to 3"),
        ("mmlu", {"choices": ["a", "b", "c", "d"], "answer": "A"}, "answer must be the number of a choice"),
    ],
)
def test_what_a_reader_cannot_read_is_named_with_its_row(reader, row, said):
    with pytest.raises(DataError, match=f"^line 7: {said}"):
        read(row, reader=reader)
