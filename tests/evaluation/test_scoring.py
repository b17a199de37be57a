import typing
from decimal import Decimal

import pytest

from shadowtune.config import data
from shadowtune.evaluation.scoring import (
    METRICS,
    accuracy_interval,
    chosen_letter,
    last_number,
    mean_interval,
    normalize,
    score_answers,
    token_f1,
)


def score(metric, answer, *references):
    (main,), _ = score_answers(metric, [answer], [references])
    return main


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
    assert score("exact_match", prediction, target) == float(same)
    assert score("exact_match", prediction, "something else", target) == float(same)


def test_answers_and_references_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="longer"):
        score_answers("exact_match", ["a"], [["a"], ["b"]])


def test_normalize_drops_one_full_stop():
    assert normalize("Wait...") == "wait.."


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("card arrival", 1),
        ("Card_arrival.", 1),
        (" card arrival\nQuestion: and now?", 1),
        ("card arrival date", 0),
        ("it is\ncard arrival", 0),
        ("", 0),
    ],
)
def test_a_label_is_the_first_line_with_or_without_underscores(answer, right):
    assert score("label", answer, "card arrival") == right
    assert score("label", answer, "card_arrival") == right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 left.\n#### 18", "18"),
        ("#### 18.", "18"),
        ("#### $1,200.00 a year, or 100 a month", "1200"),
        ("#### 7\n\nQuestion: 8?\n#### 9", "9"),
        ("first 12, then 40 dollars", "40"),
        ("3 apples ####", "3"),
        ("it fell to -5", "-5"),
        ("10-5", "5"),
        ("1,200, 300 and 12,34", "34"),
        ("1,2000", "2000"),
        ("about .5", "0.5"),
        ("12.50 and no more", "12.5"),
    ],
)
def test_the_number_stands_after_the_last_mark_else_last(text, number):
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none at all", "####"])
def test_text_without_a_number_has_none_and_is_never_right(text):
    assert last_number(text) is None
    assert score("number", text, "#### 18") == score("number", text, "no number") == 0


def test_numbers_are_compared_by_value():
    assert score("number", "So 1,200.00", "1150 + 50\n#### 1200") == 1
    assert score("number", "18.", "#### 18") == 1
    assert score("number", "18 dollars, after 20", "#### 18") == 0


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" (C) the third", "C"),
        ("Answer: D.", "D"),
        ("A", "A"),
        ("A is right", "A"),
        ("A. True, False", "A"),
        ("a", None),
        ("a good question", None),
        ("A good question, B", "B"),
        ("BCD and Alice", None),
        ("E", None),
        ("", None),
    ],
)
def test_a_choice_is_a_capital_letter_that_stands_alone_and_never_an_article(text, letter):
    assert chosen_letter(text) == letter
    assert score("choice", text, "A") == float(letter == "A")


@pytest.mark.parametrize(
    ("answer", "exact", "f1"),
    [
        ("The Eiffel tower!", 1, 1),
        ("north", 1, 1),
        ("eiffel", 0, 2 / 3),
        ("big big north", 0, 1 / 2),
        ("tower of steel", 0, 2 / 5),
        ("unanswerable", 0, 0),
        ("eiffel tower\nQuestion: why?", 1, 1),
    ],
)
def test_a_span_is_held_against_every_reference(answer, exact, f1):
    (main,), others = score_answers("squad", [answer], [["Eiffel Tower", "the north"]])
    assert (main, others) == (exact, {"f1": pytest.approx(f1)})


@pytest.mark.parametrize(
    ("answer", "right"), [("Unanswerable.", 1), ("no answer", 1), ("", 1), ("none", 0), ("Paris", 0)]
)
def test_a_question_without_an_answer_wants_to_be_told_so(answer, right):
    (main,), others = score_answers("squad", [answer], [["unanswerable"]])
    assert main == others["f1"] == right


def test_words_count_as_often_as_they_occur():
    assert token_f1("yes yes no", "yes no no") == pytest.approx(2 / 3)
    assert token_f1("the", "a") == 1  # articles alone are no words, in both
    assert token_f1("the", "yes") == 0


def test_f1_turns_the_scores_of_squad_round():
    answers, references = ["eiffel", "north"], [["Eiffel Tower"], ["the north"]]
    scores, others = score_answers("f1", answers, references)
    assert scores == pytest.approx([2 / 3, 1])
    assert others == {"exact_match": 0.5}


def test_the_metrics_are_those_that_a_task_can_name():
    assert tuple(METRICS) == typing.get_args(data.Metric)


def test_interval_agrees_with_published_values():
    # Wilson, 1927; e.g. Newcombe 1998, table I: 81/263 -> 0.2553 to 0.3662
    low, high = accuracy_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert mean_interval([1.0] * 81 + [0.0] * 182) == (low, high)


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (5, 10), (0, 0)])
def test_interval_holds_the_share_and_stays_within_0_and_1(correct, total):
    low, high = accuracy_interval(correct, total)
    assert 0 <= low <= (correct / total if total else 0.5) <= high <= 1


def test_interval_of_fractions_is_that_of_the_normal_distribution():
    low, high = mean_interval([0.2, 0.4, 0.6, 0.4])  # mean 0.4, standard error sqrt(0.08 / 3) / 2
    assert (low, high) == (
        pytest.approx(0.4 - 1.96 * 0.0816497, abs=1e-5),
        pytest.approx(0.4 + 1.96 * 0.0816497, abs=1e-5),
    )
    assert mean_interval([0.5]) == (0.0, 1.0)
    assert mean_interval([0.9, 1.0, 0.5])[1] == 1.0


@pytest.mark.parametrize("scores", [[0.0] * 16, [1.0] * 16, [0.5] * 16, [0.5]])
def test_no_interval_is_without_width(scores):
    low, high = mean_interval(scores)
    assert 0 <= low <= scores[0] <= high <= 1
    assert high - low > 0.15
