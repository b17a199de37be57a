"""Rows under chat templates of the shapes that real models have."""

import json

import pytest

from shadowtune.config.data import DataConfig
from shadowtune.data.dataset import Dataset
from shadowtune.data.encoding import encode_prompts, encode_rows
from shadowtune.data.examples import FieldNames, fill_template, read_messages
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.data.segments import render_messages
from shadowtune.errors import ConfigError, DataError
from tests.support.chats import GPT_OSS, PARTS, QWEN3, R1, chat_tokenizer
from tests.support.tokenizers import CHATML

THOUGHTS = "<think>\n\n</think>\n\n"
FIELDS = FieldNames()


def turns(*contents, system=None):
    roles = ("user", "assistant")
    said = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
    return said if system is None else [{"role": "system", "content": system}, *said]


def encoded(rows, template, **settings):
    """The text of each sequence, of what is learned in it, and the report."""
    tokenizer = chat_tokenizer(template)
    found, report = encode_rows(rows, tokenizer, FIELDS, 500, **settings)
    learned = [[label for label in row["labels"] if label != -100] for row in found]
    return [tokenizer.decode(row["input_ids"]) for row in found], [tokenizer.decode(ids) for ids in learned], report


def refused(rows, template, match):
    with pytest.raises(DataError, match=match) as caught:
        encoded(rows, template)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("row 1")


# Scaffolding


@pytest.mark.parametrize(
    ("template", "prefix", "ended"),
    [
        (QWEN3, THOUGHTS, "<|im_end|>"),
        (GPT_OSS, "<|channel|>final<|message|>", "<|return|>"),
        (CHATML, "", "<|im_end|>"),
    ],
    ids=["qwen3", "gpt_oss", "chatml"],
)
def test_what_the_template_puts_before_every_answer_belongs_to_the_prompt(template, prefix, ended):
    rows = [{"prompt": "tea", "completion": "hot"}, {"messages": turns("sea", "wet")}]
    _, learned, report = encoded(rows, template)
    assert learned == ["hot" + ended, "wet" + ended]
    assert report.answer_prefix == prefix


@pytest.mark.parametrize("template", [QWEN3, GPT_OSS, CHATML], ids=["qwen3", "gpt_oss", "chatml"])
def test_prompts_of_training_evaluation_and_requests_are_the_same_ids(template):
    tokenizer = chat_tokenizer(template)
    rows = [{"prompt": "tea", "completion": "hot"}, {"messages": turns("sea", "wet", "why", "rain", system="be kind")}]
    found, report = encode_rows(rows, tokenizer, FIELDS, 500)
    form = PromptFormat().learned_from(report)
    prompts = encode_prompts(rows, tokenizer, FIELDS, 500, answer_prefix=report.answer_prefix)
    asked = [turns("tea"), rows[1]["messages"][:-1]]
    last = {row["row"]: row for row in found}
    for number, (messages, prompt) in enumerate(zip(asked, prompts, strict=True), 1):
        assert form.encode(messages, tokenizer) == prompt.input_ids
        assert last[number]["input_ids"][: len(prompt.input_ids)] == prompt.input_ids
        assert all(label != -100 for label in last[number]["labels"][len(prompt.input_ids) :])
    assert form.prompt_ids("tea", tokenizer) == prompts[0].input_ids


def test_where_only_some_answers_have_thoughts_the_prompt_keeps_what_all_begin_with():
    rows = [
        {"messages": turns("tea", "hot")},
        {"messages": [*turns("sea"), {"role": "assistant", "content": "wet", "reasoning_content": "rain"}]},
    ]
    _, learned, report = encoded(rows, QWEN3)
    assert (report.answer_prefix, report.content_mark) == ("<think>\n", "</think>")
    assert encoded(rows[1:], QWEN3)[2].content_mark == "</think>"
    assert encoded(rows[:1], QWEN3)[2].content_mark == ""
    assert learned == ["\n</think>\n\nhot<|im_end|>", "rain\n</think>\n\nwet<|im_end|>"]


def test_validation_rows_and_evaluation_take_the_prefix_of_training():
    data = Dataset(DataConfig(train="t"), form=PromptFormat(answer_prefix=THOUGHTS))
    tokenizer = chat_tokenizer(QWEN3)
    thoughtful = [{"messages": [*turns("sea"), {"role": "assistant", "content": "wet", "reasoning_content": "rain"}]}]
    for training in (False, True):
        (row,), _ = data.encode(thoughtful, tokenizer, classify=False, training=training)
        assert THOUGHTS in tokenizer.decode(row["input_ids"])
    assert tokenizer.decode(data.encode_prompts(thoughtful, tokenizer)[0].input_ids).endswith(THOUGHTS)


# Several turns


def test_qwen3s_turns_are_learned_one_by_one_as_the_last_of_their_conversation():
    texts, learned, report = encoded([{"messages": turns("a", "b", "c", "d")}], QWEN3)
    start = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert texts == [
        start + THOUGHTS + "b<|im_end|>",
        start + "b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n" + THOUGHTS + "d<|im_end|>",
    ]
    assert learned == ["b<|im_end|>", "d<|im_end|>"]
    assert (report.examples, report.dropped) == (2, 0)


def test_gpt_oss_turns_all_learn_the_end_of_a_last_turn():
    texts, learned, report = encoded([{"messages": turns("a", "b", "c", "d")}], GPT_OSS)
    assert learned == ["b<|return|>", "d<|return|>"]
    assert "b<|end|><|start|>user" in texts[1]
    assert len(report.ends) == 1


def test_chatml_keeps_a_conversation_in_one_sequence():
    texts, learned, report = encoded([{"messages": turns("a", "b", "c", "d")}], CHATML)
    assert (len(texts), learned, report.examples) == (1, ["b<|im_end|>d<|im_end|>"], 1)


@pytest.mark.parametrize("contents", [("a", "b"), ("a", "b", "c", "d")], ids=["one_turn", "two_turns"])
def test_a_block_that_the_generation_prompt_opens_is_named_as_the_reason(contents):
    with pytest.raises(DataError, match=r"generation prompt ends in '<think>\\n'.*data\.chat_template=false") as caught:
        encoded([{"messages": turns(*contents)}], R1)
    assert "row of its own" not in str(caught.value)


def test_the_way_out_of_such_a_template_works():
    rows = [{"text": "tea", "completion": "hot"}]
    fields = FieldNames(template="User {text} Assistant", completion="completion")
    found, _ = encode_rows(rows, chat_tokenizer(R1), fields, 99, chat_template=False)
    assert chat_tokenizer(R1).decode(found[0]["input_ids"]) == "User tea Assistant hot<|im_end|>"


def test_dropped_sequences_are_counted_where_a_row_makes_several():
    rows = [{"messages": turns("a", "b", "c" * 60, "d")}]
    tokenizer = chat_tokenizer(QWEN3)
    found, report = encode_rows(rows, tokenizer, FIELDS, 60, overlong="drop")
    assert (len(found), report.examples, report.dropped) == (1, 1, 1)


# What rows may hold

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def test_tools_reach_the_prompt_in_training_evaluation_and_requests():
    tokenizer = chat_tokenizer(QWEN3)
    for tools in ([TOOL], json.dumps([TOOL])):
        row = {"messages": turns("sea", "wet"), "tools": tools}
        texts, _, report = encoded([row], QWEN3)
        assert "Tools:" in texts[0] and "look" in texts[0]
        (prompt,) = encode_prompts([row], tokenizer, FIELDS, 500, answer_prefix=report.answer_prefix)
        form = PromptFormat().learned_from(report)
        assert prompt.input_ids == form.encode(turns("sea"), tokenizer, tools=[TOOL])
        assert prompt.input_ids != form.encode(turns("sea"), tokenizer)
        assert report.unread == ()
    plain = {"prompt": "sea", "completion": "wet", "tools": [TOOL]}
    assert "look" in encoded([plain], QWEN3)[0][0]


def test_tools_that_no_template_shows_are_refused():
    refused([{"messages": turns("sea", "wet"), "tools": [TOOL]}], CHATML, "does not show tools")
    refused([{"prompt": "sea", "completion": "wet", "tools": [TOOL]}], None, "tools need a tokenizer with a chat")
    refused([{"messages": turns("sea", "wet"), "tools": "look"}], QWEN3, "tools must be a list")
    with pytest.raises(DataError, match="does not show tools"):
        PromptFormat().encode(turns("sea"), chat_tokenizer(CHATML), tools=[TOOL])


@pytest.mark.parametrize("missing", [True, False], ids=["missing", "null"])
def test_content_may_be_null_beside_tool_calls(missing):
    call = {name: value for name, value in CALLING.items() if not (missing and name == "content")}
    _, learned, _ = encoded([{"messages": [*turns("sea"), call]}], QWEN3)
    assert learned[0].startswith("<call>look {") or learned[0].startswith("<call>look ")
    assert learned[0].endswith("<|im_end|>")
    refused([{"messages": [*turns("sea"), {"role": "assistant", "content": None}]}], QWEN3, "content of message 2")
    refused(
        [{"messages": [*turns("sea"), {"role": "assistant", "content": "a", "tool_calls": [{}]}]}], QWEN3, "no function"
    )


def test_arguments_of_tool_calls_are_shown_as_objects_not_as_text_in_quotes():
    tokenizer = chat_tokenizer(QWEN3)
    rendered = tokenizer.apply_chat_template([*turns("sea"), CALLING], tokenize=False)
    assert '\\"at\\"' in rendered, "the template itself would quote the text"
    messages = read_messages([*turns("sea"), CALLING, {"role": "tool", "content": "blue"}], "messages", "here")
    assert '<call>look {"at": "sea"}<|im_end|>' in render_messages(messages, tokenizer).text


def test_a_tool_call_that_no_template_shows_is_refused():
    refused([{"messages": [*turns("sea"), {**CALLING, "content": "well"}]}], CHATML, "leaves out the tool call 'look'")


def test_arguments_of_the_chat_template_are_given_in_training_evaluation_and_requests():
    tokenizer = chat_tokenizer(QWEN3)
    row = {"prompt": "sea", "completion": "wet", "chat_template_kwargs": {"enable_thinking": False}}
    texts, learned, report = encoded([row, row], QWEN3)
    assert learned == ["wet<|im_end|>"] * 2 and THOUGHTS in texts[0]
    assert (report.template_kwargs, report.answer_prefix, report.unread) == ({"enable_thinking": False}, "", ())
    form = PromptFormat().learned_from(report)
    (prompt,) = encode_prompts([row], tokenizer, FIELDS, 500)
    asked = form.encode(turns("sea"), tokenizer)
    assert asked == prompt.input_ids == form.prompt_ids("sea", tokenizer)
    assert asked == PromptFormat().encode(turns("sea"), tokenizer, template_kwargs={"enable_thinking": False})
    assert form.encode(turns("sea"), tokenizer, template_kwargs={"enable_thinking": True}) != asked
    assert encoded([row, {"prompt": "a", "completion": "b"}], QWEN3)[2].template_kwargs == {}


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "add_generation_prompt", "messages", "tools"])
def test_arguments_that_say_how_a_template_is_applied_are_refused(name):
    with pytest.raises(DataError, match=f"may not hold {name}"):
        PromptFormat().encode(turns("sea"), chat_tokenizer(), template_kwargs={name: "x"})
    refused([{"messages": turns("a", "b"), "chat_template_kwargs": {name: "x"}}], CHATML, f"may not hold {name}")


def test_turns_of_weight_0_are_read_and_not_learned():
    said = turns("a", "b", "c", "d")
    for number, weight, learned in ((1, 0, "d"), (3, 0, "b"), (1, 1, "bd")):
        weighted = [{**turn, "weight": weight} if index == number else turn for index, turn in enumerate(said)]
        for template in (CHATML, QWEN3):
            texts, found, _ = encoded([{"messages": weighted}], template)
            assert "".join(found) == "".join(f"{answer}<|im_end|>" for answer in learned)
            assert "b<|im_end|>" in texts[-1], "it is read"
    row = {"messages": [*said[:3], {**said[3], "weight": 0}]}
    assert encode_prompts([row], chat_tokenizer(), FIELDS, 99)[0].target == "b"
    refused([{"messages": [said[0], {**said[1], "weight": 0}]}], CHATML, "assistant of weight 0")
    refused([{"messages": [said[0], {**said[1], "weight": 0.5}]}], CHATML, "weight of message 2 must be 0")


def test_a_text_that_the_template_leaves_out_is_an_error_in_training_and_requests():
    refused([{"messages": turns("hi", "yo")}], PARTS, "leaves out the")
    refused([{"messages": turns("user", "yo")}], PARTS, "leaves out the")
    for text in ("hi", "user", "s"):
        with pytest.raises(DataError, match=r"leaves out the text of message 1 \(user\)"):
            PromptFormat().encode(turns(text), chat_tokenizer(PARTS))
    deaf = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}")
    refused([{"messages": turns("a", "b", system="be kind")}], deaf, r"leaves out the text of message 1 \(system\)")


def test_a_part_of_an_answer_that_the_template_takes_out_is_an_error():
    cutting = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    refused([{"messages": turns("a", "<think>x</think>y")}], cutting, "changes or leaves out part of")
    assert encoded([{"messages": turns("a", "<think>x</think>y")}], CHATML)[1] == ["<think>x</think>y<|im_end|>"]


def test_fields_that_nothing_reads_are_named_once():
    rows = [{"prompt": "a", "completion": "b", "id": 1}, {"prompt": "a", "completion": "b", "source": "x", "id": 2}]
    assert encoded(rows, CHATML)[2].unread == ("id", "source")
    assert encoded([{"messages": turns("a", "b"), "prompt": "x"}], CHATML)[2].unread == ("prompt",)
    assert encoded([{"text": "a", "date": 3}], CHATML)[2].unread == ("date",)
    fields = FieldNames(template="{q} {context}", completion="a", optional=("context",))
    rows = [{"q": "x", "a": "y", "answer": "z"}]
    assert encode_rows(rows, chat_tokenizer(None), fields, 99)[1].unread == ("answer",)


# Templates of several fields


@pytest.mark.parametrize(
    ("template", "row", "filled"),
    [
        ("{instruction}\n\n{input}", {"instruction": "go"}, "go"),
        ("{instruction}\n\n{input}", {"instruction": "go", "input": None}, "go"),
        ("{instruction}\n\n{input}", {"instruction": "go", "input": ""}, "go"),
        ("{instruction}\n\n{input}", {"instruction": "go", "input": "on"}, "go\n\non"),
        ("Do: {instruction}\nWith: {input}\nAnswer:", {"instruction": "go"}, "Do: go\nAnswer:"),
        ("With: {input}\nDo: {instruction}", {"instruction": "go", "input": 0}, "With: 0\nDo: go"),
    ],
)
def test_an_optional_field_is_left_out_with_the_text_before_it(template, row, filled):
    assert fill_template(template, row, "here", ("input",)) == filled
    form = PromptFormat(template, False, ("input",))
    given = {name: str(value) for name, value in row.items() if value not in (None, "") and name != "instruction"}
    assert form.fill("go", given) == filled


def test_a_field_that_is_not_optional_is_still_needed():
    with pytest.raises(DataError, match="no field 'input'"):
        fill_template("{instruction} {input}", {"instruction": "go"}, "here")


def test_a_single_text_goes_where_the_settings_say():
    assert PromptFormat("{context} {question}", main_field="question").fill("why", {"context": "rain"}) == "rain why"
    assert PromptFormat("{a} {b}").fill("x", {"b": "y"}) == "x y", "only one is left"
    assert PromptFormat("{a} {b}").fill(None, {"a": "x", "b": "y"}) == "x y"
    for form, arguments, said in (
        (PromptFormat("{a} {b}"), ("x", None), "the fields a, b, and nothing says which"),
        (PromptFormat("{a} {b}", main_field="a"), ("x", None), "b is not given"),
        (PromptFormat("{a} {b}"), (None, {"a": "x"}), "b is not given"),
        (PromptFormat("{a} {b}"), ("x", {"bb": "y"}), "no field 'bb' .did you mean b"),
        (PromptFormat("{a}"), ("x", {"a": "y"}), "are the same part"),
        (PromptFormat(), ("x", {"a": "y"}), "have no fields"),
    ):
        with pytest.raises(DataError, match=said):
            form.fill(*arguments)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optional_fields": ["x"]}, "set template"),
        ({"main_field": "x"}, "set template"),
        ({"template": "{a} {b}", "optional_fields": ["c"]}, "optional_fields names c"),
        ({"template": "{a} {b}", "main_field": "c"}, "main_field names c"),
        ({"template": "{a} {b}", "main_field": "b", "optional_fields": ["b"]}, "cannot be optional"),
    ],
)
def test_settings_of_fields_that_do_not_go_together_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        DataConfig(train="t", **settings)


def test_rows_lose_optional_fields_in_training_as_requests_do():
    settings = DataConfig(
        train="t", template="{instruction}\n\n{input}", optional_fields=("input",), chat_template=False
    )
    data, tokenizer = Dataset(settings), chat_tokenizer()
    rows = [{"instruction": "go", "completion": "on"}, {"instruction": "go", "input": "far", "completion": "on"}]
    prompts = data.encode_prompts(rows, tokenizer)
    form = data.prompt_format
    assert prompts[0].input_ids == form.encode(turns("go"), tokenizer)
    assert prompts[1].input_ids == form.encode(turns("go"), tokenizer, fields={"input": "far"})


# One function makes prompts


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_post_processor_that_ends_texts_does_not_end_prompts(add_bos):
    from shadowtune.data.encoding import prompt_ids
    from shadowtune.export.detaching import built_in_prompts

    ending, plain = chat_tokenizer(None, add_bos, add_eos=True), chat_tokenizer(None, add_bos)
    assert ending("tea")["input_ids"] == [*plain("tea")["input_ids"], 2]
    rows = [{"prompt": "tea", "completion": "hot"}]
    assert encode_prompts(rows, ending, FIELDS, 99)[0].input_ids == plain("tea")["input_ids"]
    assert prompt_ids("tea", ending) == plain("tea")["input_ids"]
    assert built_in_prompts(ending) == built_in_prompts(plain)
