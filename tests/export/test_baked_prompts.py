"""What stock chat clients make of a saved model: by its chat template alone, the prompt of training."""

import importlib.util
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from shadowtune.cli.main import main
from shadowtune.data.chat_template import add_chat_template, load_tokenizer_and_format, save_tokenizer
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.evaluation.run import FinishedRun
from shadowtune.export.loading import load_model
from shadowtune.export.runtimes import GgufModel
from tests.export.support import plain_model
from tests.support.chats import QWEN3, chat_tokenizer, learned_run
from tests.support.tokenizers import CHATML

ROWS = [
    {"text": "tea", "completion": "hot"},
    {"text": "sea", "completion": "wet"},
    {"text": "sun", "completion": "big"},
]
USER = [{"role": "user", "content": "sea"}]
THOUGHTS = "<think>\n\n</think>\n\n"
needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run trained with a template of its own, on a base whose tokenizer has ChatML and a begin token."""
    settings = {"template": "Word: {text}\nIs:", "chat_template": False}
    tokenizer = chat_tokenizer(CHATML, add_bos=True)
    return learned_run(tmp_path_factory.mktemp("learned"), ROWS, tokenizer, 80, **settings)


@pytest.fixture(scope="module")
def detached(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("detached") / "small"
    assert main(["detach", str(run), "--out", str(out)]) == 0
    return out


def test_transformers_answers_a_chat_message_by_the_directory_alone(run, detached):
    for directory in (detached, run / "model"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
        ids = tokenizer.apply_chat_template(USER, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**ids, max_new_tokens=12, do_sample=False)
        said = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said.strip() == "wet"
    chat = pipeline("text-generation", model=str(detached))
    (answer,) = chat(USER, max_new_tokens=12, do_sample=False)
    assert answer["generated_text"][-1]["content"].strip() == "wet"


@needs_llama_cpp
def test_llama_cpp_answers_a_chat_message_by_the_file_alone(detached, tmp_path):
    out = tmp_path / "model.gguf"
    assert main(["export", str(detached), "--to", "gguf", "--quant", "f32", "--out", str(out)]) == 0
    runtime = GgufModel(out, 256, 1)
    for text, expected in (("sea", "wet"), ("tea", "hot")):
        messages = [{"role": "user", "content": text}]
        answer = runtime._ask("/v1/chat/completions", messages=messages, max_tokens=12, temperature=0)
        assert answer["choices"][0]["message"]["content"].strip() == expected
    prompt = answer["usage"]["prompt_tokens"]
    opened = load_model(out)
    assert prompt == len(opened.prompt_format.encode([{"role": "user", "content": "tea"}], opened.tokenizer))
    assert opened.tokenizer.chat_template == CHATML, "our own code keeps to the original"


def test_stock_clients_are_told_that_a_system_prompt_or_history_is_lost(detached):
    tokenizer = AutoTokenizer.from_pretrained(detached)
    for messages in (
        [{"role": "system", "content": "be kind"}, *USER],
        [*USER, {"role": "assistant", "content": "x"}, *USER],
    ):
        with pytest.raises(Exception, match="one message of role user"):
            tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def test_the_card_says_how_to_prompt(detached, monkeypatch):
    card = (detached / "README.md").read_text()
    assert "Word: your text\nIs:\n```" in card
    assert "It reads one message of a user: no system message, no history." in card
    assert 'TEMPLATE """Word: {{ .Prompt }}\nIs:"""' in card
    snippet = card.split("```python")[1].split("```")[0]
    monkeypatch.chdir(detached.parent)
    said = []
    exec(snippet.replace("your text", "sea"), {"print": said.append})
    assert said[0].strip() == "wet"


def test_evaluate_generate_and_the_edge_read_the_same_prompt(run, detached):
    finished = FinishedRun.open(run)
    asked = finished.dataset.encode_prompts([dict(row) for row in ROWS], finished.tokenizer)
    opened = load_model(detached)
    stock = AutoTokenizer.from_pretrained(detached)
    for row, prompt in zip(ROWS, asked, strict=True):
        messages = [{"role": "user", "content": row["text"]}]
        assert opened.prompt_format.encode(messages, opened.tokenizer) == prompt.input_ids
        assert stock.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == prompt.input_ids
        assert finished.prompt_format.prompt_ids(row["text"], finished.tokenizer) == prompt.input_ids
    assert asked[0].input_ids[0] == stock.bos_token_id


FORMS = {
    "template_for_chatml": (CHATML, PromptFormat("Q '{text}' \\ now!\n")),
    "no_chat_template": (None, PromptFormat()),
    "words_alone": (CHATML, PromptFormat(chat_template=False)),
    "start_of_answers": (QWEN3, PromptFormat(answer_prefix=THOUGHTS)),
    "arguments": (QWEN3, PromptFormat(template_kwargs={"enable_thinking": False})),
    "both": (QWEN3, PromptFormat("Q {text}", answer_prefix=THOUGHTS)),
    "optional_field": (CHATML, PromptFormat("{instruction}\n\n{input}", False, ("input",))),
    "optional_field_in_chat": (QWEN3, PromptFormat("{instruction}\n\n{input}", True, ("input",))),
    "literal_braces": (CHATML, PromptFormat("{{'{text}'}} {{{{ x }}}} {{% if %}}", False)),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("add_eos", [False, True])
def test_a_baked_template_makes_the_ids_of_the_format(name, add_bos, add_eos, tmp_path):
    template, form = FORMS[name]
    tokenizer = chat_tokenizer(template, add_bos, add_eos)
    saved = save_tokenizer(tokenizer, form, tmp_path)
    assert saved.baked
    assert (tokenizer.chat_template, form.baked) == (template, False), "what is given is left as it is"
    stock = AutoTokenizer.from_pretrained(tmp_path)
    ours, read = load_tokenizer_and_format(str(tmp_path))
    assert read == form
    assert (ours.chat_template, read.tokenizer_chat_template) == (template, template)
    for text in ("sea", "  a\nb ", "'\"\\{{ x }}", "tea {text}"):
        messages = [{"role": "user", "content": text}]
        found = stock.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert found == read.encode(messages, ours) == form.encode(messages, tokenizer)
    assert add_chat_template(stock, read)[0].chat_template == stock.chat_template, "baking again changes nothing"


@needs_llama_cpp
@pytest.mark.parametrize("name", FORMS)
def test_llama_cpp_renders_it_alike(name, tmp_path):
    from shadowtune.export.gguf_file import write_gguf

    template, form = FORMS[name]
    tokenizer = chat_tokenizer(template)
    baked, saved = add_chat_template(tokenizer, form)
    write_gguf(plain_model()[0], baked, tmp_path / "m.gguf", "f32", saved)
    runtime = GgufModel(tmp_path / "m.gguf", 256, 1)
    for text in ("sea", "it's a 'b'"):
        messages = [{"role": "user", "content": text}]
        rendered = runtime._ask("/apply-template", messages=messages)["prompt"]
        assert rendered == baked.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_a_conversation_keeps_its_earlier_turns_and_the_last_message_is_filled(tmp_path):
    tokenizer = chat_tokenizer(QWEN3)
    form = PromptFormat("Q {text}", answer_prefix=THOUGHTS)
    save_tokenizer(tokenizer, form, tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    found = stock.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert found == form.encode(messages, tokenizer)
    assert tokenizer.decode(found).endswith("user\nQ three<|im_end|>\n<|im_start|>assistant\n" + THOUGHTS)
    off = stock.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)["input_ids"]
    assert off == found == form.encode(messages, tokenizer, template_kwargs={"enable_thinking": False})


def test_what_the_tokenizers_own_template_makes_is_not_baked(tmp_path):
    saved = save_tokenizer(chat_tokenizer(CHATML), PromptFormat(), tmp_path)
    assert not saved.baked
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == CHATML


def test_where_no_field_is_the_main_one_a_message_is_the_whole_prompt(tmp_path):
    saved = save_tokenizer(chat_tokenizer(CHATML), PromptFormat("{a} {b}", False), tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert stock.apply_chat_template(USER, tokenize=False, add_generation_prompt=True) == "sea"
    assert saved.baked
    assert Path(tmp_path / "prompt_format.json").is_file()


@pytest.mark.parametrize("data", [{}, {"block_size": 8}], ids=["rows", "blocks"])
def test_a_run_on_plain_texts_leaves_the_chat_template_as_it_is(data, tmp_path):
    texts = [{"text": "the sea is wet"}, {"text": "the sun is big"}]
    for template in (CHATML, None):
        path = tmp_path / ("with" if template else "without")
        path.mkdir()
        run = learned_run(path, texts, chat_tokenizer(template), 1, **data)
        assert AutoTokenizer.from_pretrained(run / "model").chat_template == template
        assert FinishedRun.open(run).prompt_format.ends == (2,)
