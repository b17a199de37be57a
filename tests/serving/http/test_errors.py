import json

import pytest

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00\xff\xfe",
        b"not json",
        b"<html></html>",
        b"null",
        b"[]",
        b"17",
        b'"text"',
        b"{",
        b'{"model": "echo"}',
        b'{"model": "echo", "messages": []}',
        b'{"model": "echo", "messages": [{"role": "user"}]}',
        b'{"model": "echo", "messages": [{"role": "tool", "content": "x"}]}',
        b'{"model": "echo", "messages": [{"role": "user", "content": null}]}',
        b'{"model": "echo", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        b'{"model": "", "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "\xff", "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "echo", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"\\ud800": 1}',
        '{"schlüssel\\n": 1}'.encode(),
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"model": "echo", "seed": ' + b"9" * 5000 + b"}",
        b"1e99999",
    ],
    ids=range(24),
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/load_adapter"])
def test_garbage_is_refused_in_one_line(asking, body, path):
    response = asking().post(path, content=body, headers=JSON)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"] and "\n" not in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "NaN"),
        ("temperature", "Infinity"),
        ("temperature", "1e400"),
        ("temperature", "-0.1"),
        ("temperature", '"1"'),
        ("temperature", "true"),
        ("top_p", "1.0001"),
        ("max_tokens", "0"),
        ("max_tokens", "1.5"),
        ("max_tokens", "2147483648"),
        ("seed", "9223372036854775808"),
        ("n", "0"),
        ("n", "1000000000000000000000"),
        ("repetition_penalty", "0"),
        ("top_k", "-2"),
        ("stop", "[1]"),
        ("stop", '""'),
        ("logit_bias", '{"5": 101}'),
        ("logit_bias", '{"-1": 1}'),
        ("stream", "1"),
        ("stream_options", "{}"),
        ("prediction", '"text"'),
    ],
)
def test_numbers_out_of_their_range_are_refused_by_name(asking, field, value):
    body = f'{{"model": "echo", "prompt": "x", "{field}": {value}}}'
    response = asking().post("/v1/completions", content=body, headers=JSON)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert field in message or message.startswith("the body is not JSON")


def test_an_error_names_the_invalid_field(asking, chat):
    body = chat()
    body["messages"].append({"role": "robot", "content": "x"})
    error = asking().post("/v1/chat/completions", json=body).json()["error"]
    assert error["param"] == "messages[1].role" and error["message"].startswith("messages[1].role: ")


def test_all_errors_are_reported_at_once(asking, chat):
    error = asking().post("/v1/chat/completions", json=chat(temperature=3, top_p=2)).json()["error"]
    assert "temperature" in error["message"] and "top_p" in error["message"] and error["param"] == "temperature"


def test_an_unknown_field_has_a_neighbour(asking, chat):
    error = asking().post("/v1/chat/completions", json=chat(max_token=3)).json()["error"]
    assert error["message"] == "max_token: there is no such field (did you mean max_tokens?)"


def test_an_error_is_openais(asking, chat):
    response = asking().post("/v1/chat/completions", json=chat(model="nobody"))
    assert response.status_code == 404
    assert response.json() == {
        "error": {
            "message": "no model 'nobody'",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("DELETE", "/v1/models", 405)])
def test_unknown_paths_and_methods_are_named(asking, method, path, status):
    response = asking().request(method, path)
    assert response.status_code == status and path in response.json()["error"]["message"]


def test_a_bug_reveals_nothing_of_the_prompt(asking, chat, caplog):
    response = asking().post("/v1/chat/completions", json=chat(model="bug"))
    assert response.status_code == 500 and "nobody may see" not in response.text
    assert "ValueError" in caplog.text and "fakes.py" in caplog.text and "nobody may see" not in caplog.text


def test_errors_may_quote_anything(asking):
    body = json.dumps({"model": "échec \u2028 \U0001f600", "prompt": "x"})
    response = asking().post("/v1/completions", content=body, headers=JSON)
    assert response.status_code == 404 and "\U0001f600" in response.json()["error"]["message"]
