import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowtune.serving.detokenizer import IncrementalDetokenizer
from tests.support.properties import property_test
from tests.support.tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


class Bytes:
    """A tokenizer whose tokens are single bytes, so that most characters need several."""

    def decode(self, tokens, **_):
        return bytes(tokens).decode(errors="replace")


def said(text, stop=(), tokenizer=TOKENIZER):
    tokens = list(text.encode()) if isinstance(tokenizer, Bytes) else tokenizer(text)["input_ids"]
    detokenizer, pieces = IncrementalDetokenizer(tokenizer, stop), []
    for token in tokens:
        pieces.append(detokenizer.add(token))
        if detokenizer.stopped:
            break
    return [*pieces, detokenizer.flush()], detokenizer.stopped


def test_each_token_gives_its_text_at_once():
    pieces, _ = said("the cat")
    assert "".join(pieces) == "the cat"
    assert all(pieces[:-1])
    assert pieces[-1] == ""


@property_test
@given(st.text(max_size=20))
def test_the_pieces_make_the_text_whatever_the_characters(text):
    assert "".join(said(text, tokenizer=Bytes())[0]) == text


def test_half_a_character_waits_for_its_other_half():
    pieces, _ = said("é!", tokenizer=Bytes())
    assert pieces == ["", "é", "!", ""]


def test_half_a_character_at_the_end_shows_as_such():
    detokenizer = IncrementalDetokenizer(Bytes())
    assert detokenizer.add("é".encode()[0]) == ""
    assert detokenizer.flush() == "�"


def test_special_tokens_are_not_part_of_the_text():
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    assert detokenizer.add(TOKENIZER.eos_token_id) + detokenizer.flush() == ""


@pytest.mark.parametrize("text", ["one STOP two", "STOP", "one STOPSTOP", "a S ST STO STOP"])
def test_no_text_from_a_stop_string_on_is_emitted(text):
    pieces, stopped = said(text, ["STOP"])
    assert stopped
    assert "".join(pieces) == text[: text.index("STOP")]


def test_the_first_of_several_stop_texts_ends_the_answer():
    assert "".join(said("abcdef", ["ef", "cd"])[0]) == "ab"


def test_a_possible_stop_string_is_held_back_until_decided():
    pieces, stopped = said("a--b-", ["--!"], Bytes())
    assert not stopped
    assert pieces == ["a", "", "", "--b", "", "-"]


def test_an_empty_stop_text_stops_nothing():
    assert "".join(said("abc", [""])[0]) == "abc"


@property_test
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=2))
def test_the_text_ends_at_the_first_complete_stop_string(text, stop):
    ends = [(text.index(each) + len(each), text.index(each)) for each in stop if each in text]
    expected = text if not ends else text[: min(ends)[1]]
    assert "".join(said(text, stop, Bytes())[0]) == expected


def test_text_that_is_put_together_already_is_stopped_alike():
    detokenizer = IncrementalDetokenizer(Bytes(), ["STOP"])
    assert [detokenizer.add_text("one S"), detokenizer.add_text("TO"), detokenizer.add_text("Px")] == ["one ", "", ""]
    assert detokenizer.stopped
    assert detokenizer.flush() == ""
