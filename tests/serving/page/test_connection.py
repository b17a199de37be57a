import pytest

from tests.serving.page.acts import last, send

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
stubs = pytest.importorskip("tests.serving.page.stub", reason="fastapi is not installed")

CHAT = "/v1/chat/completions"


def retried(page, stub):
    """Whether after a failure the same question and then another one are answered."""
    stub.refuse.clear()
    stub.script = stub.hello
    last(page, ".fault button").click()
    expect(last(page)).to_have_text("Hello from the model")
    send(page, "another")
    expect(page.locator(".answer[aria-busy=false]")).to_have_count(2)
    expect(last(page)).to_have_text("Hello from the model")
    expect(page.locator(".answer.failed")).to_have_count(0)


def test_a_key_is_asked_for_kept_in_the_tab_and_used(visit, stub, watch):
    stub.key = "sk-right"
    watch.expected = ("401",)
    page = visit()
    expect(page.locator("#key")).to_be_focused()
    expect(page.locator("#link")).to_have_text("locked")
    page.locator("#key").fill("sk-wrong")
    page.locator("#key").press("Enter")
    expect(page.locator("#refused")).to_contain_text("did not take that key")
    page.locator("#key").fill("sk-right")
    page.locator("#key").press("Enter")
    expect(page.locator("#lock")).to_be_hidden()
    expect(page.locator("#link")).to_have_text("connected")
    send(page, "hello")
    expect(last(page)).to_have_text("Hello from the model")
    assert page.evaluate("sessionStorage.getItem('shadowtune-key')") == "sk-right"
    assert page.evaluate("localStorage.length") == 0
    page.reload()
    expect(page.locator("#model")).to_be_enabled()
    expect(page.locator("#lock")).to_be_hidden()


def test_a_key_taken_back_in_the_middle_asks_again_and_the_message_goes_out(visit, stub, watch):
    watch.expected = ("401",)
    page = visit()
    expect(page.locator("#model")).to_be_enabled()
    stub.key = "sk-new"
    send(page, "still there?")
    expect(page.locator("#lock")).to_be_visible()
    page.locator("#key").fill("sk-new")
    page.locator("#key").press("Enter")
    expect(last(page)).to_have_text("Hello from the model")
    assert len(stub.bodies) == 1


def test_a_key_that_no_header_can_carry_is_refused_in_words(visit, stub, watch):
    stub.key = "sk-right"
    watch.expected = ("401",)
    page = visit()
    page.locator("#key").fill("schlüssel")
    page.locator("#key").press("Enter")
    expect(page.locator("#refused")).to_contain_text("letters, digits and signs")


def test_a_key_can_be_forgotten(visit, stub, watch):
    stub.key = "sk-right"
    watch.expected = ("401",)
    page = visit()
    page.locator("#key").fill("sk-right")
    page.locator("#key").press("Enter")
    expect(page.locator("#lock")).to_be_hidden()
    page.locator("#open-settings").click()
    page.locator("#forget").click()
    expect(page.locator("#lock")).to_be_visible()
    assert not page.evaluate("sessionStorage.getItem('shadowtune-key')")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (stubs.refusal(500, "the engine fell over"), "the engine fell over"),
        (stubs.refusal(429, "too many requests", {"retry-after": "7"}), "too many requests Try again in 7 s."),
        (stubs.refusal(400, "max_tokens is 0; give 1 or more"), "max_tokens is 0; give 1 or more"),
        (stubs.HTMLResponse("<h1>Bad gateway</h1>", 502), "The server answered 502 Bad Gateway."),
        (stubs.JSONResponse({"error": "no"}, 503), "The server answered 503 Service Unavailable."),
        (stubs.JSONResponse({"hello": 1}), "no stream of events but application/json"),
        (stubs.HTMLResponse("<h1>Log in</h1>"), "no stream of events but text/html"),
    ],
    ids=["500", "429", "400", "html", "json-without-message", "not-a-stream", "portal"],
)
def test_a_refusal_is_shown_and_the_message_can_go_again(visit, stub, watch, answer, told):
    watch.expected = ("Failed to load resource",)
    stub.refuse[CHAT] = answer
    page = visit()
    send(page, "hello")
    expect(last(page, ".fault")).to_contain_text(told)
    retried(page, stub)


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        (["data: {not json\n\n"], "an event of it is not JSON"),
        (["\x00\x01\x02 garbage \n\n"], "broke off: the connection closed before its end"),
        ([stubs.event("half of")], "broke off: the connection closed before its end"),
        ([stubs.event("half of"), 'data: {"error": {"message": "time is up"}}\n\n'], "time is up"),
        (["data: 1\n\n", "data: null\n\n", "data: []\n\n", 'data: {"choices": 3}\n\n'], "closed before its end"),
        (["data: " + "x" * 700_000, "x" * 700_000], "an event of it does not end"),
    ],
    ids=["not-json", "bytes", "cut", "error-event", "other-json", "endless-line"],
)
def test_a_stream_that_makes_no_sense_is_told_and_the_message_can_go_again(visit, stub, pieces, told):
    stub.sends(*pieces)
    page = visit()
    send(page, "hello")
    expect(last(page, ".fault")).to_contain_text(told)
    retried(page, stub)


def test_a_failed_message_is_no_part_of_the_conversation(visit, stub, watch):
    watch.expected = ("Failed to load resource",)
    stub.sends(stubs.event("half of"))
    page = visit()
    send(page, "one")
    expect(last(page, ".fault")).to_contain_text("broke off")
    stub.script = stub.hello
    send(page, "two")
    expect(last(page)).to_have_text("Hello from the model")
    assert stub.bodies[1]["messages"] == [{"role": "user", "content": "two"}]


def test_a_server_that_went_away_is_told_and_its_return_noticed(visit, stub, server, watch):
    watch.expected = ("ERR_CONNECTION_REFUSED",)
    page = visit()
    expect(page.locator("#link")).to_have_text("connected")
    server.stop()
    send(page, "anyone?")
    expect(last(page, ".fault")).to_contain_text("The server cannot be reached.")
    expect(page.locator("#trouble")).to_contain_text("The server cannot be reached. Looking again in")
    expect(page.locator("#link")).to_have_text("not connected")
    again = stubs.Running(stubs.app(stub), server.port)
    try:
        page.locator("#again").click()
        expect(page.locator("#trouble")).to_be_hidden()
        retried(page, stub)
    finally:
        again.stop()


def test_a_server_that_dies_in_the_middle_of_an_answer_leaves_what_was_said(visit, stub, server, watch):
    watch.expected = ("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING")

    async def script(body):
        yield stubs.event("So far")
        await stub.opened()

    stub.script = script
    page = visit()
    send(page, "go on")
    expect(last(page)).to_have_text("So far")
    server.stop()
    expect(last(page, ".fault")).to_contain_text("broke off")
    expect(last(page)).to_have_text("So far")


def test_looks_at_a_failing_server_come_ever_less_often(visit, stub, watch):
    watch.expected = ("Failed to load resource",)
    stub.refuse["/v1/recent"] = stubs.Response("no", 500)
    page = visit()
    for seconds in (4, 8, 16, 30):
        expect(page.locator("#trouble")).to_contain_text(f"Looking again in {seconds} s.")
        if seconds < 30:
            page.locator("#again").click()
    stub.refuse.clear()
    page.locator("#again").click()
    expect(page.locator("#trouble")).to_be_hidden()


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/recent", "/v1/policy"])
@pytest.mark.parametrize(
    "answer", ["<html>", "[", "null", "[]", '{"data": 3, "requests": "x"}', '{"curve": [null, 1]}']
)
def test_garbage_from_any_endpoint_neither_breaks_the_page_nor_stays(visit, stub, path, answer):
    stub.be_an_edge()
    stub.refuse[path] = stubs.Response(answer)
    page = visit()
    expect(page.locator("#link")).not_to_have_text("connecting")
    stub.refuse.clear()
    page.reload()
    expect(page.locator("#link")).to_have_text("connected")
    send(page, "hello")
    expect(last(page)).to_have_text("Hello from the model")


def test_a_server_that_is_not_ours_is_told(visit, stub):
    stub.refuse["/v1/models"] = stubs.HTMLResponse("<h1>Router login</h1>")
    page = visit()
    expect(page.locator("#trouble")).to_contain_text("What came from /v1/models is not JSON")
    expect(page.locator("#model")).to_be_disabled()


def test_a_server_without_models_says_so_in_the_chooser(visit, stub):
    stub.models = []
    page = visit()
    expect(page.locator("#model")).to_contain_text("the server has no model")
    expect(page.locator("#model")).to_be_disabled()


def test_a_silent_server_is_told_after_a_while(visit, stub):
    async def script(body):
        await stub.opened()
        yield stubs.ending(stub.decision)

    stub.script = script
    page = visit()
    page.clock.install()
    send(page, "hello")
    expect(last(page, ".waiting")).to_contain_text("Waiting for the first word")
    page.clock.run_for(20_000)
    expect(last(page, ".waiting")).to_contain_text("Nothing heard for")
    stub.gate.set()


def test_no_look_is_taken_while_the_page_is_hidden(visit, stub, watch):
    page = visit()
    expect(page.locator("#link")).to_have_text("connected")
    page.clock.install()
    page.evaluate("""() => {
        Object.defineProperty(document, 'hidden', {value: true, configurable: true});
        document.dispatchEvent(new Event('visibilitychange'));
    }""")
    with page.expect_response("**/v1/recent"):  # the end of an answer is looked at once, hidden or not
        send(page, "hello")
    page.wait_for_timeout(100)
    before = len(watch.urls)
    page.clock.run_for(20_000)
    assert len(watch.urls) == before
    with page.expect_request("**/v1/recent"):
        page.evaluate("""() => {
            Object.defineProperty(document, 'hidden', {value: false, configurable: true});
            document.dispatchEvent(new Event('visibilitychange'));
        }""")


def test_storage_that_is_forbidden_does_not_matter(browser, server, stub, watch):
    stub.key = "sk-right"
    watch.expected = ("401",)
    context = browser.new_context()
    context.add_init_script("Object.defineProperty(window, 'sessionStorage', {get() { throw new Error('no') }})")
    page = watch.over(context.new_page())
    page.goto(server.url)
    page.locator("#key").fill("sk-right")
    page.locator("#key").press("Enter")
    expect(page.locator("#link")).to_have_text("connected")
    context.close()
    assert not watch.faults()
