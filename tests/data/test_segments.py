import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowtune.data.examples import Completion, Conversation, PlainText
from shadowtune.data.segments import Renderer, Segment, has_template, render_prompt, target_text
from shadowtune.errors import DataError
from tests.support.properties import property_test
from tests.support.templates import REFUSING, REWRITING, UNCLOSED
from tests.support.tokenizers import tiny_tokenizer

CHATML = tiny_tokenizer()
BARE = tiny_tokenizer(chat_template=None)


def turns(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


def pieces(example, tokenizer=CHATML, chat_template=True):
    return Renderer(tokenizer, chat_template).sequences(example, "here")[-1]


def sequences(example, tokenizer=CHATML, chat_template=True):
    return Renderer(tokenizer, chat_template).sequences(example, "here")


def refuse(example, message, tokenizer=CHATML, chat_template=True):
    with pytest.raises(DataError, match=f"here: {message}") as caught:
        pieces(example, tokenizer, chat_template)
    assert "\n" not in str(caught.value)


def test_a_template_is_used_if_there_is_one_and_it_is_wanted():
    assert has_template(CHATML, True)
    assert not has_template(CHATML, False)
    assert not has_template(BARE, True)


def test_plain_text_is_one_piece_that_needs_an_end():
    assert pieces(PlainText("a text")) == [Segment("a text", learned=True, add_bos=True, add_eos=True)]


def test_a_completion_without_template_begins_with_the_space_between():
    for tokenizer, wanted in ((BARE, True), (CHATML, False)):
        assert pieces(Completion("one", "two"), tokenizer, wanted) == [
            Segment("one", learned=False, add_bos=True),
            Segment(" two", learned=True, add_eos=True),
        ]


@pytest.mark.parametrize(
    ("prompt", "completion", "joined"),
    [
        ("one", "two", " two"),
        ("one ", "two", "two"),
        ("one\n", "two", "two"),
        ("one", " two", " two"),
        ("one", "\ntwo", "\ntwo"),
        ("", "two", "two"),
        ("one", "", ""),
    ],
)
def test_a_space_is_put_in_only_where_there_is_no_white_space(prompt, completion, joined):
    assert [piece.text for piece in pieces(Completion(prompt, completion), BARE)] == [prompt, joined]


def test_an_answer_is_learned_with_its_end_of_turn_token_and_without_the_line_break_after_it():
    assert pieces(Completion("hi", "yo")) == [
        Segment("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", learned=False),
        Segment("yo<|im_end|>", learned=True),
    ]


def test_every_answer_of_a_conversation_is_learned_and_the_line_break_goes_to_the_next_prompt():
    assert pieces(Conversation(turns("a", "b", "c", "d"))) == [
        Segment("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", learned=False),
        Segment("b<|im_end|>", learned=True),
        Segment("\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n", learned=False),
        Segment("d<|im_end|>", learned=True),
    ]


def test_only_answers_from_the_first_learned_on_are():
    found = pieces(Conversation(turns("a", "b", "c", "d"), first_learned=3))
    assert [piece.text for piece in found if piece.learned] == ["d<|im_end|>"]
    assert "b<|im_end|>" in found[0].text


def test_messages_after_the_last_answer_are_left_out():
    assert pieces(Conversation(turns("a", "b", "c"))) == pieces(Conversation(turns("a", "b")))


def test_where_the_template_ends_no_turn_the_answer_needs_an_end():
    tokenizer = tiny_tokenizer(UNCLOSED)
    assert pieces(Conversation(turns("a", "b ", "c", "d")), tokenizer) == [
        Segment("user: a\nassistant: ", learned=False),
        Segment("b", learned=True, add_eos=True),
        Segment(" \nuser: c\nassistant: ", learned=False),
        Segment("d", learned=True, add_eos=True),
    ]


def test_white_space_at_the_end_of_an_answer_is_kept_where_the_turn_has_an_end():
    assert pieces(Completion("hi", "yo \n"))[1] == Segment("yo \n<|im_end|>", learned=True)


@pytest.mark.parametrize("answer", ["", ">", "|>", "_end|>", "<|im_end|>"])
def test_an_answer_that_is_empty_or_ends_like_the_turn_gets_the_turns_end_once(answer):
    assert pieces(Completion("hi", answer))[1] == Segment(answer + "<|im_end|>", learned=True)
    assert pieces(Completion("hi", answer), tiny_tokenizer(UNCLOSED))[1] == Segment(answer, learned=True, add_eos=True)


def test_a_template_that_rewrites_earlier_turns_makes_a_sequence_of_each_answer():
    tokenizer = tiny_tokenizer(REWRITING)
    one, two = sequences(Conversation(turns("a", "b", "c", "d")), tokenizer)
    start = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert one == [Segment(start, False), Segment("think b<|im_end|>", True)]
    again = start + "b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    assert two == [Segment(again, False), Segment("think d<|im_end|>", True)], (
        "the earlier answer has lost its thoughts"
    )


def test_what_the_template_refuses_is_one_line():
    messages = [{"role": "system", "content": "be kind"}, *turns("a", "b")]
    refuse(Conversation(messages), "the tokenizer's chat template refuses .*system role", tiny_tokenizer(REFUSING))


def test_messages_without_a_template_are_refused():
    for tokenizer, wanted in ((BARE, True), (CHATML, False)):
        refuse(Conversation(turns("a", "b")), "messages need a tokenizer with a chat template", tokenizer, wanted)


def test_conversations_without_an_answer_or_without_a_question_are_refused():
    refuse(Conversation(turns("a")), r"no message of the assistant to learn from \(roles: user\)")
    refuse(Conversation(turns("a", "b"), first_learned=2), "no message of the assistant")
    refuse(Conversation(turns("a", first="assistant")), "begins with the assistant's turn")


def test_the_target_is_the_last_answer():
    assert target_text(Completion("a", " b"), "") == " b"
    assert target_text(Conversation(turns("a", "b", "c", "d", "e")), "") == "d"
    with pytest.raises(DataError, match="here: plain text has no answer"):
        target_text(PlainText("a"), "here")
    with pytest.raises(DataError, match="here: no message of the assistant"):
        target_text(Conversation(turns("a")), "here")


@property_test
@given(prompt=st.text(), completion=st.text())
def test_the_prompt_alone_reads_as_it_does_before_its_completion(prompt, completion):
    for tokenizer in (CHATML, BARE, tiny_tokenizer(UNCLOSED), tiny_tokenizer(REFUSING)):
        assert pieces(Completion(prompt, completion), tokenizer)[0] == render_prompt(prompt, tokenizer, True)


@property_test
@given(st.lists(st.text(), min_size=2, max_size=6))
def test_the_pieces_are_what_the_template_writes_less_the_white_space_at_the_end(contents):
    messages = turns(*contents)
    last = len(messages) - len(messages) % 2
    whole = CHATML.apply_chat_template(messages[:last], tokenize=False)
    found = pieces(Conversation(messages))
    assert "".join(piece.text for piece in found) == whole.rstrip()
    assert [piece.text for piece in found if piece.learned] == [c + "<|im_end|>" for c in contents[1::2]]
