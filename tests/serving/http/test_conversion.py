import pytest

from shadowtune.serving.http.handlers import chat_requests, completion_requests
from shadowtune.serving.http.protocol import ChatCompletionRequest, CompletionRequest
from shadowtune.serving.requests import RequestError, SamplingParams

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(limit=None, **fields):
    return chat_requests(ChatCompletionRequest(model="m", messages=MESSAGES, **fields), limit)


def completion(limit=None, **fields):
    return completion_requests(CompletionRequest(model="m", prompt="p", **fields), limit)


def test_missing_fields_have_openais_defaults():
    (request,) = chat()
    assert request.sampling == SamplingParams() and request.max_tokens is None and request.stop == ()
    assert request.top_logprobs is None and request.prediction is None and request.speculate
    assert not request.ignore_eos


def test_given_fields_are_converted():
    fields = {"temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "presence_penalty": -1.0, "frequency_penalty": 2.0}
    (request,) = chat(
        **fields, top_k=7, repetition_penalty=1.5, seed=-3, logit_bias={"12": -100}, stop="x", speculate=False,
        ignore_eos=True, max_tokens=9,
    )  # fmt: skip
    assert request.sampling == SamplingParams(
        **fields, top_k=7, repetition_penalty=1.5, seed=-3, logit_bias={12: -100.0}
    )
    assert (request.stop, request.max_tokens) == (("x",), 9) and request.ignore_eos and not request.speculate


@pytest.mark.parametrize(("asked", "used"), [(0, 0.0), (1e-320, 0.0), (0.0009, 0.0), (0.001, 0.001), (1, 1.0)])
def test_a_temperature_too_cold_to_divide_by_takes_the_likeliest(asked, used):
    assert chat(temperature=asked)[0].sampling.temperature == used


@pytest.mark.parametrize(("asked", "used"), [(-1, None), (0, None), (1, 1)])
def test_top_k_can_be_left_out_in_three_ways(asked, used):
    assert chat(top_k=asked)[0].sampling.top_k == used


@pytest.mark.parametrize(
    ("fields", "told"), [({}, None), ({"logprobs": False}, None), ({"logprobs": True}, 0),
                         ({"logprobs": True, "top_logprobs": 3}, 3)],
)  # fmt: skip
def test_logprobs_of_chats(fields, told):
    assert chat(**fields)[0].top_logprobs == told


@pytest.mark.parametrize("said", [None, 0, 5])
def test_logprobs_of_completions(said):
    assert completion(logprobs=said)[0].top_logprobs == said


def test_more_tokens_than_the_server_gives_are_refused():
    assert chat(limit=5, max_tokens=5)[0].max_tokens == 5
    with pytest.raises(RequestError, match="max_tokens 6 is more than this server's 5") as refused:
        chat(limit=5, max_completion_tokens=6)
    assert (refused.value.status, refused.value.param) == (400, "max_tokens")


@pytest.mark.parametrize("way", [chat, completion])
def test_without_max_tokens_the_servers_limit_applies(way):
    (request,) = way(limit=5)
    assert (request.max_tokens, request.clamp_max_tokens) == (5, True)
