import asyncio
import logging
from dataclasses import replace

import pytest

from shadowtune.config.serving import CloudConfig, PolicyConfig, Prices
from shadowtune.errors import ConfigError
from shadowtune.export.loading import wrap_model
from shadowtune.serving.edge.confidence import TokenStatistics, token_confidence, token_threshold
from shadowtune.serving.edge.local import LocalModel
from shadowtune.serving.edge.remote import RemoteEndpoint
from shadowtune.serving.edge.router import Router
from shadowtune.serving.requests import GenerationRequest, RequestError, SamplingParams
from tests.export.support import plain_model
from tests.serving.edge.models import FORMAT, answered, ask, gather, text, through_both_sides
from tests.serving.edge.sockets import STREAM_HEAD, answer, cloud_that, hangs, refusal, words

MODEL, TOKENIZER = plain_model()
COUNT = 8


def local():
    return LocalModel(wrap_model(MODEL, TOKENIZER, FORMAT), "tiny")


def chat(text):
    messages = [{"role": "user", "content": text}]
    return GenerationRequest("tiny", messages=messages, max_tokens=COUNT, sampling=SamplingParams(temperature=0))


def unsure_case():
    """A request, the threshold at which its third token or a later one is the first unsure one, and the texts."""
    for question in ("hi", "red", "a sea", "day one", "sun", "ten", "ice", "two red", "say it", "go on"):
        chunks, stream = answered(local(), chat(question))
        sure = [token_confidence(token, "logprob") for token in stream.statistics]
        index = next(n for n in range(len(sure)) if sure[n] == min(sure))
        if index >= 2 and len(chunks) == COUNT + 1 and all(chunk.text for chunk in chunks[:COUNT]):
            parts = [chunk.text for chunk in chunks]
            return chat(question), (min(sure) + min(sure[:index])) / 2, "".join(parts[:index]), "".join(parts)
    raise AssertionError("no request of this model has its least sure token late")


REQUEST, THRESHOLD, PREFIX, WHOLE = unsure_case()


def routed(*script, request=REQUEST, threshold=THRESHOLD, **fields):
    """Return the chunks, the decision, the scripted cloud and the router's counters."""

    async def run():
        async with cloud_that(*script) as fake:
            config = CloudConfig(fake.url, model="big", read_timeout=0.3, deadline=1.0, retries=0, idle_timeout=0.3)
            policy = PolicyConfig(kind="token", threshold=threshold, **fields)
            router = Router(local(), RemoteEndpoint(config), policy)
            try:
                chunks, stream = await gather(router, request)
                await stream.aclose()
                return chunks, stream.decision, fake, router.counters()
            finally:
                await router.aclose()

    return asyncio.run(run())


def outcome(counters):
    return {name.removeprefix("mid_answer_") for name, value in counters.items() if "mid_answer" in name and value}


def test_a_sure_answer_is_streamed_and_the_cloud_hears_nothing():
    chunks, decision, fake, counters = routed(answer("no"), threshold=0.0)
    assert text(chunks) == WHOLE and len(chunks) > COUNT
    assert (decision.side, decision.reason, decision.cost, fake.bodies) == ("edge", "confident", 0.0, [])
    assert outcome(counters) == {"confident"}


@pytest.mark.parametrize("parts", [1, 2, 3, 99])
def test_the_cloud_continues_from_the_text_so_far(parts):
    whole = PREFIX + "!! and more"
    size = max(1, len(whole) // parts)
    cut = [whole[n : n + size] for n in range(0, len(whole), size)]
    prices = Prices(prompt=1.0, completion=2.0)
    chunks, decision, fake, counters = routed(answer(*cut, usage=(5, 6)), prices=prices)
    assert text(chunks) == whole
    assert fake.bodies[0]["prediction"] == {"type": "content", "content": PREFIX}
    assert fake.bodies[0]["messages"] == list(REQUEST.messages)
    assert (decision.side, decision.reason, decision.cost) == ("cloud", "continued", 5 + 2 * 6)
    assert 0 < decision.confidence < THRESHOLD
    assert outcome(counters) == {"continued"}
    assert counters["correction_rate"] == 1.0
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]


def test_a_cloud_that_goes_on_as_the_edge_would_have_is_no_correction():
    chunks, decision, _, counters = routed(answer(WHOLE))
    assert text(chunks) == WHOLE and decision.reason == "continued"
    assert counters["correction_rate"] == 0.0


def test_with_an_unsure_first_token_the_cloud_answers():
    chunks, decision, fake, counters = routed(answer("cloud"), threshold=1.0)
    assert text(chunks) == "cloud"
    assert (decision.side, decision.reason) == ("cloud", "unsure")
    assert "prediction" not in fake.bodies[0]
    assert outcome(counters) == {"unsure"}


@pytest.mark.parametrize("said", ["?other", PREFIX[:-1], PREFIX[:-1] + "?", ""])
def test_a_cloud_that_disagrees_with_what_was_sent_leaves_the_answer_to_the_edge(said):
    chunks, decision, _, counters = routed(answer(*said))
    assert text(chunks) == WHOLE
    assert (decision.side, decision.reason) == ("edge", "contradicted")
    assert decision.cost > 0
    assert chunks[-1].finish_reason == "length" and chunks[-1].usage.completion_tokens == COUNT
    assert outcome(counters) == {"contradicted"}


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (hangs, "cloud timed out"),
        (b"", "cloud broke off"),
        (refusal(500), "cloud answered 500"),
        (STREAM_HEAD + words(reason=None), "cloud broke off"),
        (STREAM_HEAD + words(PREFIX[:1], reason=None), "cloud broke off"),
    ],
)
def test_a_cloud_that_fails_after_deferral_leaves_one_whole_answer(script, reason, caplog):
    with caplog.at_level(logging.WARNING, "shadowtune.serving"):
        chunks, decision, _, counters = routed(script)
    assert text(chunks) == WHOLE
    assert (decision.side, decision.reason) == ("fallback", reason)
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]
    assert outcome(counters) == {"fallback"}
    assert f"deferred in mid-answer: {reason}" in caplog.text


def test_a_cloud_that_breaks_off_in_its_own_part_is_continued_by_the_edge():
    chunks, decision, _, counters = routed(STREAM_HEAD + words(PREFIX + "xy", reason=None))
    assert text(chunks).startswith(PREFIX + "xy")
    assert (decision.side, decision.reason) == ("fallback", "cloud broke off")
    assert chunks[-1].finish_reason is not None and chunks[-1].usage.completion_tokens == COUNT
    assert outcome(counters) == {"fallback"}


@pytest.mark.parametrize("changes", [{"sampling": SamplingParams(temperature=1.0, seed=1)}, {"top_logprobs": 1}])
def test_what_cannot_be_continued_is_routed_by_its_whole_answer(changes):
    chunks, decision, fake, counters = routed(answer("cloud"), request=replace(REQUEST, **changes), threshold=1.0)
    assert (text(chunks), decision.side, decision.reason) == ("cloud", "cloud", "unsure")
    assert "prediction" not in fake.bodies[0] and outcome(counters) == set()


def test_another_model_is_unknown():
    with pytest.raises(RequestError, match="there is no model"):
        routed(answer("x"), request=replace(REQUEST, model="other"))


def test_an_answer_can_begin_with_given_tokens():
    own = asyncio.run(_generated())

    async def run():
        model = local()
        try:
            stream = await model.generate(REQUEST, prefix=tuple(own[:3]))
            return [chunk async for chunk in stream], stream
        finally:
            await model.aclose()

    chunks, stream = asyncio.run(run())
    assert text(chunks) == WHOLE and stream.generated == own
    assert chunks[-1].usage.completion_tokens == COUNT


async def _generated():
    model = local()
    _, stream = await gather(model, REQUEST)
    await model.aclose()
    return stream.generated


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_with_our_own_cloud_the_answer_is_one_of_the_two_or_the_clouds_from_the_prefix_on(seed, threshold):
    request = ask(model="tiny", prompt=[5 + seed, 6, 7, 8], max_tokens=12, ignore_eos=True)
    policy = PolicyConfig(kind="token", threshold=threshold)
    own, alone, found, decision = through_both_sides(seed, request, policy)
    assert text(found) == text(own if decision.side == "cloud" else alone)


@pytest.mark.parametrize(
    ("signal", "expected"), [("logprob", 0.5), ("margin", 0.3), ("entropy", 0.8), ("agreement", 0.75)]
)
def test_confidences_of_a_token(signal, expected):
    token = TokenStatistics(1, -0.6931472, 0.3, 0.2, (), (-1.0986123, 0.0))
    assert token_confidence(token, signal) == pytest.approx(expected)
    assert token_confidence(replace(token, deferral=None), "agreement") == 0.0


def test_the_cost_model_defers_less_where_the_cloud_is_dearer():
    policy = PolicyConfig(kind="token", value=100.0, answer_tokens=10, prices=Prices(prompt=1.0, completion=2.0))
    assert token_threshold(policy, 20) == pytest.approx(1 - (20 + 20) / 100)
    assert token_threshold(policy, 50) == pytest.approx(0.3)
    assert token_threshold(policy, 500) == 0.0
    assert token_threshold(PolicyConfig(kind="token", threshold=0.7), 500) == 0.7


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "token", "signal": "first"}, "needs a signal of single tokens"),
        ({"value": 5.0}, "value=5 is for kind token"),
    ],
)
def test_what_does_not_go_together(fields, said):
    with pytest.raises(ConfigError, match=said):
        PolicyConfig(**fields)
