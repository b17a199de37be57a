"""The page in front of the product's own app, with a backend that has no model."""

import pytest

from shadowtune.config.serving import ServerConfig, hash_key
from shadowtune.serving.requests import RoutingDecision
from tests.serving.page.acts import last, send, waits_for

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
stubs = pytest.importorskip("tests.serving.page.stub", reason="fastapi is not installed")
fakes = pytest.importorskip("tests.serving.http.fakes", reason="a package of the extra serve is not installed")


@pytest.fixture
def policy():
    return fakes.FakePolicy()


@pytest.fixture
def backend():
    return fakes.FakeBackend(decision=RoutingDecision("edge", "confident", 0.87, 0.0))


@pytest.fixture
def config():
    return ServerConfig()


@pytest.fixture
def server(backend, config, policy):
    running = stubs.Running(fakes.create_app(backend, config, "edge", policy=policy))
    yield running
    running.stop()


def test_a_message_is_answered_with_its_decision_and_shows_in_the_plots(visit, backend):
    page = visit()
    send(page, "to be or not")
    expect(last(page)).to_have_text("to be or not")
    assert page.locator(".facts li").all_inner_texts()[:4] == [
        "edge",
        "confident",
        "confidence 0.87",
        "cost 0 cloud tokens",
    ]
    expect(page.locator("#latency svg > .edge")).to_have_count(1)
    (request,) = backend.asked
    assert (request.model, request.max_tokens, request.sampling.temperature) == ("echo", 256, 0)


def test_the_page_comes_under_a_policy_of_the_server_and_cannot_be_framed(visit):
    page = visit()
    headers = page.request.get(page.url).headers
    assert "frame-ancestors 'none'" in headers["content-security-policy"]


def test_stop_frees_the_answer(visit, backend):
    page = visit()
    page.locator("#model").select_option("hang")
    send(page, "one two")
    expect(last(page)).to_have_text("one")
    page.locator("#stop").click()
    assert waits_for(page, lambda: backend.answers[0].closed)


def test_the_slider_turns_the_policy(visit, policy):
    page = visit()
    expect(page.locator("#threshold")).to_have_text("0.500")
    policy.threshold = 0.2
    page.reload()
    expect(page.locator("#threshold")).to_have_text("0.200")
    page.locator("#curve svg").click()
    expect(page.locator("#threshold")).to_have_text("0.500")
    assert waits_for(page, lambda: policy.threshold == 0.5)


@pytest.mark.parametrize(
    ("model", "told"),
    [("refuse", "the prompt has 99 tokens"), ("full", "the queue is full"), ("late", "the pass failed")],
)
def test_refusals_and_late_failures_are_told_and_the_next_message_works(visit, watch, model, told):
    watch.expected = ("Failed to load resource",)
    page = visit()
    page.locator("#model").select_option(model)
    send(page, "one two")
    expect(last(page, ".fault")).to_contain_text(told)
    page.locator("#model").select_option("echo")
    send(page, "and now")
    expect(last(page)).to_have_text("and now")


class TestWithKeys:
    @pytest.fixture
    def config(self):
        return ServerConfig(key_hashes=(hash_key("sk-right"),))

    def test_the_page_asks_for_a_key_and_then_works(self, visit, watch):
        watch.expected = ("401",)
        page = visit()
        page.locator("#key").fill("sk-right")
        page.locator("#key").press("Enter")
        expect(page.locator("#link")).to_have_text("connected")
        send(page, "open sesame")
        expect(last(page)).to_have_text("open sesame")
