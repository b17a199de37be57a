import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowtune.core.losses import IGNORE_INDEX
from shadowtune.data import segments
from shadowtune.data.segments import Segment, TokenizedSegments, begin_tokens, tokenize, tokenize_segments
from shadowtune.errors import DataError
from tests.support.properties import property_test
from tests.support.tokenizers import BOS, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
BEGINNING = tiny_tokenizer(add_bos=True)
EOS = TOKENIZER.eos_token_id
texts = st.text(alphabet="the cat\n.T1é", max_size=12)


def pieces(*texts, add_eos=True):
    return [Segment(t, bool(i % 2), add_bos=i == 0, add_eos=add_eos and bool(i % 2)) for i, t in enumerate(texts)]


def encode(*texts, tokenizer=TOKENIZER):
    return next(tokenize_segments(tokenizer, [pieces(*texts)]))


def test_labels_are_the_answers_and_their_end_and_nothing_else():
    result = encode("a", " b", " c", " d", tokenizer=BEGINNING)
    a, b, c, d = (TOKENIZER(text)["input_ids"] for text in ("a", " b", " c", " d"))
    assert result.ids == [1, *a, *b, EOS, *c, *d, EOS]
    assert result.labels == [IGNORE_INDEX, *[IGNORE_INDEX] * len(a), *b, EOS, *[IGNORE_INDEX] * len(c), *d, EOS]
    assert result.prompt_length == 1 + len(a) + len(b) + 1 + len(c)


def test_an_answer_gets_the_tokens_it_has_in_its_context():
    assert encode("in", " the hat").ids[:-1] == TOKENIZER("in the hat")["input_ids"]


def test_a_prompt_keeps_its_tokens_where_an_answer_would_merge_with_them():
    prompt = TOKENIZER("in ")["input_ids"]
    assert TOKENIZER("in the")["input_ids"][: len(prompt)] != prompt, "they would merge"
    assert encode("in ", "the").ids == [*prompt, *TOKENIZER("the")["input_ids"], EOS]


def test_plain_text_has_no_prompt_and_is_learned_whole():
    result = next(tokenize_segments(BEGINNING, [[Segment("the cat", True, add_bos=True, add_eos=True)]]))
    assert result.prompt_length == 0
    assert result.ids == [1, *TOKENIZER("the cat")["input_ids"], EOS]
    assert result.labels == [IGNORE_INDEX, *result.ids[1:]]


def test_an_end_that_the_tokenizer_lacks_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="the tokenizer has no end-of-sequence token"):
        list(tokenize_segments(tokenizer, [pieces("a", "b")]))
    assert list(tokenize_segments(tokenizer, [pieces("a", "b", add_eos=False)]))


def test_begin_tokens_are_those_that_the_tokenizer_adds():
    assert begin_tokens(BEGINNING) == [TOKENIZER.bos_token_id]
    assert begin_tokens(TOKENIZER) == []


def test_a_tokenizer_without_begin_token_adds_none():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    assert begin_tokens(tokenizer) == []


def test_begin_tokens_stand_only_before_pieces_that_open():
    opened, inside = Segment("a", False, add_bos=True), Segment("a", False)
    ids = TOKENIZER("a")["input_ids"]
    assert [result.ids for result in tokenize_segments(BEGINNING, [[opened], [inside]])] == [[1, *ids], ids]
    assert [result.ids for result in tokenize_segments(TOKENIZER, [[opened], [inside]])] == [ids, ids]


def test_texts_keep_their_order_over_chunks(monkeypatch):
    monkeypatch.setattr(segments, "CHUNK", 3)
    words = [str(number) for number in range(10)]
    assert list(tokenize(TOKENIZER, iter(words))) == [TOKENIZER(word)["input_ids"] for word in words]


def test_special_tokens_are_added_only_on_demand():
    assert next(tokenize(BEGINNING, ["a"], add_special_tokens=True)) == [1, *next(tokenize(BEGINNING, ["a"]))]


@property_test
@given(st.lists(st.lists(texts, min_size=2, max_size=6).filter(lambda row: len(row) % 2 == 0), min_size=1, max_size=4))
def test_rows_together_are_rows_alone_and_every_prompt_is_a_prefix(rows):
    together = list(tokenize_segments(BEGINNING, [pieces(*row) for row in rows]))
    assert together == [encode(*row, tokenizer=BEGINNING) for row in rows]
    for row, result in zip(rows, together, strict=True):
        prompt = [1, *TOKENIZER(row[0])["input_ids"]]
        assert result.ids[: len(prompt)] == prompt
        assert len(result.labels) == len(result.ids)
        assert all(label in (IGNORE_INDEX, token) for label, token in zip(result.labels, result.ids, strict=True))
        assert result.labels.count(EOS) == len(row) // 2
        assert all(label == IGNORE_INDEX for label in result.labels[: len(prompt)])
        assert IGNORE_INDEX not in result.labels[result.prompt_length :]
        plain = [token for token in result.ids[1:] if token != EOS]
        assert TOKENIZER.decode(plain) == TOKENIZER.decode(TOKENIZER("".join(row))["input_ids"])


def sample(prompt, answer):
    ids = list(range(10, 10 + prompt + answer))
    return TokenizedSegments(ids, [IGNORE_INDEX] * prompt + ids[prompt:], prompt)


@property_test
@given(prompt=st.integers(1, 12), answer=st.integers(0, 6), length=st.integers(1, 20), begins=st.booleans())
def test_truncation_keeps_the_answer_and_the_end_of_the_prompt(prompt, answer, length, begins):
    result, before = sample(prompt, answer), sample(prompt, answer)
    length = min(length, prompt + answer)
    begin = result.ids[0] if begins else None
    if answer >= length:
        with pytest.raises(DataError, match=f"the answer alone has {answer} tokens, .* in {length}"):
            result.truncate(length, begin)
        return
    result.truncate(length, begin)
    assert len(result.ids) == len(result.labels) == length
    assert result.ids[result.prompt_length :] == before.ids[prompt:] == result.labels[result.prompt_length :]
    assert result.labels[: result.prompt_length] == [IGNORE_INDEX] * result.prompt_length
    kept = result.ids[: result.prompt_length]
    if begins and len(kept) > 1:
        assert kept[0] == begin
        kept = kept[1:]
    assert kept == before.ids[prompt - len(kept) : prompt]


def test_plain_text_keeps_its_start():
    result = TokenizedSegments([1, 2, 3, 4], [IGNORE_INDEX, 2, 3, 4], 0)
    result.truncate(3, 1)
    assert (result.ids, result.labels) == ([1, 2, 3], [IGNORE_INDEX, 2, 3])


def test_the_begin_token_is_one_token():
    assert TOKENIZER(BOS)["input_ids"] == [TOKENIZER.bos_token_id]
