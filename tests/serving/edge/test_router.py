import asyncio
from dataclasses import asdict, replace

import pytest

from shadowtune.config.serving import CloudConfig, CurvePoint, DriftConfig, PolicyConfig, Prices
from shadowtune.errors import ConfigError
from shadowtune.export.loading import wrap_model
from shadowtune.serving.edge.local import LocalModel
from shadowtune.serving.edge.openai_api import RemoteError
from shadowtune.serving.edge.remote import RemoteEndpoint
from shadowtune.serving.edge.router import Router
from shadowtune.serving.requests import RequestError
from tests.export.support import plain_model
from tests.serving.edge.models import FORMAT, ask, text, through_both_sides
from tests.serving.edge.sockets import STREAM_HEAD, answer, cloud_that, hangs, refusal, words

MODEL, TOKENIZER = plain_model()
CHAT = ask(prompt=None, messages=[{"role": "user", "content": "hi"}])
SURE, UNSURE = {"threshold": 0.0}, {"threshold": 1.0}


def edge_text():
    from shadowtune.export.runtimes import TorchModel

    ids = TorchModel(MODEL).generate(TOKENIZER("say hi")["input_ids"], 6)
    return TOKENIZER.decode(ids)


EDGE = edge_text()


def routed(*script, request=CHAT, policy=None, edge_deadline=60.0, max_length=None, **fields):
    """Ask a router over a scripted cloud; return pieces, decisions before and after, and what the cloud saw."""
    policy = policy or PolicyConfig(**fields)

    async def run():
        async with cloud_that(*script) as fake:
            config = CloudConfig(fake.url, model="big", read_timeout=0.3, deadline=1.0, retries=0)
            opened = wrap_model(MODEL, TOKENIZER, FORMAT)
            opened.max_length = max_length or opened.max_length
            router = Router(LocalModel(opened, "tiny"), RemoteEndpoint(config), policy, edge_deadline)
            try:
                found = await router.generate(request)
                before, pieces = found.decision, []
                try:
                    async for piece in found:
                        pieces.append(piece)
                except RemoteError as error:
                    pieces.append(error)
                await found.aclose()
                return pieces, before, found.decision, fake
            finally:
                await router.aclose()

    return asyncio.run(run())


def test_a_sure_answer_stays_and_the_cloud_hears_nothing():
    pieces, before, after, fake = routed(answer("cloud"), **SURE)
    assert text(pieces) == EDGE
    assert (before.side, before.reason, before.cost) == ("edge", "confident", 0.0)
    assert 0 < before.confidence < 1
    assert before == after
    assert fake.bodies == []
    assert pieces[-1].usage.completion_tokens == 6


def test_an_unsure_answer_is_dropped_and_the_cloud_is_asked_what_the_edge_was():
    prices = Prices(prompt=1.0, completion=2.0, request=10.0)
    pieces, before, after, fake = routed(answer("cl", "oud", usage=(5, 3)), **UNSURE, prices=prices)
    assert text(pieces) == "cloud"
    assert (before.side, before.reason) == ("cloud", "unsure")
    assert before.cost == 10 + len(TOKENIZER("say hi")["input_ids"])
    assert after.cost == 10 + 5 + 2 * 3
    assert after.confidence == before.confidence
    assert fake.bodies[0]["messages"] == [{"role": "user", "content": "hi"}]
    assert "prediction" not in fake.bodies[0]


@pytest.mark.parametrize("kind", ["tag", "confidence"])
def test_the_tag_hands_over_however_sure_it_is(kind):
    pieces, before, *_ = routed(answer("cloud"), kind=kind, threshold=0.0, tag=EDGE[:3])
    assert text(pieces) == "cloud"
    assert (before.side, before.reason) == ("cloud", "tag")
    pieces, before, *_ = routed(answer("cloud"), kind=kind, threshold=0.0, tag="[OTHER]")
    assert text(pieces) == EDGE
    assert before.side == "edge"


def test_always_edge_answers_at_once():
    pieces, before, _, fake = routed(answer("cloud"), kind="always-edge")
    assert (text(pieces), before.side, before.reason, fake.bodies) == (EDGE, "edge", "always-edge", [])


def test_always_cloud_asks_the_edge_nothing_unless_the_cloud_fails():
    pieces, before, after, _ = routed(answer("cloud"), kind="always-cloud")
    assert (text(pieces), before.side, before.confidence, after.cost) == ("cloud", "cloud", None, 7.0)
    pieces, before, *_ = routed(refusal(500), kind="always-cloud")
    assert (text(pieces), before.side, before.reason) == (EDGE, "fallback", "cloud answered 500")
    assert before.confidence is not None


@pytest.mark.parametrize("policy", [UNSURE, {"kind": "verify"}, {"kind": "tag", "tag": EDGE[:2]}])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (hangs, "cloud timed out"),
        (b"", "cloud broke off"),
        (refusal(500), "cloud answered 500"),
        (refusal(400), "cloud answered 400"),
        (b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\n\r\n<html>", "cloud sent garbage"),
        (STREAM_HEAD + words(reason=None), "cloud broke off"),
    ],
)
def test_a_cloud_that_fails_leaves_the_edges_own_answer(fault, reason, policy):
    pieces, before, after, _ = routed(fault, **policy)
    assert text(pieces) == EDGE
    assert pieces[-1].finish_reason == "length"
    assert (before.side, before.reason, before.cost) == ("fallback", reason, 0.0)
    assert before == after


def test_a_cloud_that_breaks_off_behind_its_first_words_is_an_error_not_another_answer():
    pieces, before, *_ = routed(STREAM_HEAD + words("half", reason=None), **UNSURE)
    *sent, error = pieces
    assert text(sent) == "half"
    assert (error.reason, before.side) == ("cloud broke off", "cloud")


@pytest.mark.parametrize(("said", "reason"), [(EDGE, "agreed"), (EDGE + "!", "corrected"), ("no", "corrected")])
def test_verify_predicts_the_edges_answer_and_says_what_became_of_it(said, reason):
    pieces, before, after, fake = routed(answer(said), kind="verify")
    assert text(pieces) == said
    assert fake.bodies[0]["prediction"] == {"type": "content", "content": EDGE}
    assert (before.side, before.reason, after.reason) == ("cloud", "verify", reason)


def test_what_is_too_long_for_the_edge_the_cloud_is_asked_for():
    pieces, before, *_ = routed(answer("cloud"), max_length=7, **SURE)
    assert (text(pieces), before.side, before.reason, before.confidence) == ("cloud", "cloud", "edge could not", None)
    with pytest.raises(RequestError, match="more than the 7 tokens") as caught:
        routed(refusal(500), max_length=7, **SURE)
    assert caught.value.status == 400


def test_an_edge_that_takes_too_long_is_not_waited_for():
    long = replace(CHAT, max_tokens=100, ignore_eos=True)
    pieces, before, *_ = routed(answer("cloud"), request=long, edge_deadline=1e-6, **SURE)
    assert (text(pieces), before.reason) == ("cloud", "edge could not")
    with pytest.raises(RequestError, match="took more than") as caught:
        routed(b"", request=long, edge_deadline=1e-6, **SURE)
    assert caught.value.status == 504


def test_another_model_is_unknown_and_nobody_is_asked():
    with pytest.raises(RequestError) as caught:
        routed(answer("cloud"), request=ask(model="other"), **UNSURE)
    assert (caught.value.status, caught.value.param) == (404, "model")


def test_giving_up_while_the_edge_drafts_frees_it():
    async def run():
        model = LocalModel(wrap_model(MODEL, TOKENIZER, FORMAT), "tiny")
        router = Router(model, RemoteEndpoint(CloudConfig("http://127.0.0.1:1")), PolicyConfig())
        task = asyncio.ensure_future(router.generate(ask(max_tokens=100, ignore_eos=True)))
        while not model.counters()["running"]:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        running = router.counters()["running"]
        await router.aclose()
        return running

    assert asyncio.run(run()) == 0


def test_the_threshold_changes_while_it_runs():
    async def run():
        async with cloud_that(answer("cloud")) as fake:
            cloud = RemoteEndpoint(CloudConfig(fake.url, model="big"))
            point = CurvePoint(0.0, 0.5, 0.0, 0.0)
            policy = PolicyConfig(threshold=0.0, curve=(point,))
            router = Router(LocalModel(wrap_model(MODEL, TOKENIZER, FORMAT), "tiny"), cloud, policy)
            first = (await router.generate(CHAT)).decision.side
            router.set_threshold(1.0)
            second = await router.generate(CHAT)
            with pytest.raises(ConfigError, match="threshold must be"):
                router.set_threshold(1.5)
            told = router.describe()
            await second.aclose()
            await router.aclose()
            return first, second.decision.side, told

    first, second, told = asyncio.run(run())
    assert (first, second) == ("edge", "cloud")
    assert told["threshold"] == 1.0
    assert (told["kind"], told["signal"]) == ("confidence", "logprob")
    assert told["curve"] == [asdict(CurvePoint(0.0, 0.5, 0.0, 0.0))]


@pytest.mark.parametrize(("said", "corrected"), [(EDGE, False), ("other", True)])
def test_the_cloud_s_answers_are_watched(said, corrected):
    async def run():
        async with cloud_that(answer(said)) as fake:
            cloud = RemoteEndpoint(CloudConfig(fake.url, model="big"))
            policy = PolicyConfig(threshold=1.0, drift=DriftConfig(warm_up=2))
            router = Router(LocalModel(wrap_model(MODEL, TOKENIZER, FORMAT), "tiny"), cloud, policy)
            for _ in range(2):
                found = await router.generate(CHAT)
                assert [piece async for piece in found]
                await found.aclose()
            told = router.describe()["drift"], router.counters()
            await router.aclose()
            return told

    drift, counters = asyncio.run(run())
    assert (drift["rate"], drift["expected"], drift["requests"]) == (corrected, corrected, 2)
    assert counters["correction_rate"] == corrected and counters["drift_alarms"] == 0


def test_a_policy_without_a_threshold_has_none_to_change():
    router = Router(None, None, PolicyConfig(kind="verify"))
    told = router.describe()
    assert {name: told[name] for name in ("kind", "threshold", "signal", "curve")} == {
        "kind": "verify",
        "threshold": None,
        "signal": None,
        "curve": [],
    }
    with pytest.raises(ConfigError, match="no threshold"):
        router.set_threshold(0.5)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_verify_gives_exactly_the_clouds_own_answer(seed):
    request = ask(model="tiny", prompt=[5 + seed, 6, 7, 8], max_tokens=12, ignore_eos=True)
    own, draft, pieces, decision = through_both_sides(seed, request, PolicyConfig(kind="verify"))
    assert text(pieces) == text(own)
    agreed = text(draft) == text(own)
    assert (decision.side, decision.reason) == ("cloud", "agreed" if agreed else "corrected")
    usage = pieces[-1].usage
    assert usage.completion_tokens == own[-1].usage.completion_tokens
    assert usage.accepted_prediction_tokens + usage.rejected_prediction_tokens > 0
