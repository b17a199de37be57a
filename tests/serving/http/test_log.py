import logging

import pytest

SECRET = "hush hush"


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.DEBUG)
    return caplog


@pytest.mark.parametrize("stream", [False, True])
def test_the_log_has_no_word_of_prompt_or_answer(asking, chat, log, stream):
    asking().post("/v1/chat/completions", json=chat(SECRET, stream=stream, stop=["hushed"]))
    assert "echo: cloud (attached), 2+2 tokens, status 200" in log.text
    assert "hush" not in log.text


@pytest.mark.parametrize("stream", [False, True])
def test_it_has_all_of_them_if_asked(asking, chat, log, stream):
    asking(log_prompts=True).post("/v1/chat/completions", json=chat(SECRET, stream=stream))
    (line,) = [record.getMessage() for record in log.records if "asked" in record.getMessage()]
    assert line == f"asked {[[{'role': 'user', 'content': SECRET}]]!r}, answered ['hush hush']"


@pytest.mark.parametrize("model", ["refuse", "fail", "bug", "late", "nobody"])
def test_errors_quote_nothing_there(asking, chat, log, model):
    for stream in (False, True):
        asking().post("/v1/chat/completions", json=chat(SECRET, model, stream=stream))
    assert "hush" not in log.text and "nobody may see" not in log.text


def test_more_tokens_than_allowed_are_refused(asking, chat):
    client = asking(max_tokens=3)
    assert client.post("/v1/chat/completions", json=chat(max_tokens=3)).status_code == 200
    assert client.post("/v1/chat/completions", json=chat(max_tokens=4)).json()["error"]["param"] == "max_tokens"
    assert client.post("/v1/chat/completions", json=chat()).json()["usage"]["completion_tokens"] == 3
