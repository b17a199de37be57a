import json

import pytest

from tests.serving.page.acts import last, send, waits_for

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
stubs = pytest.importorskip("tests.serving.page.stub", reason="fastapi is not installed")


def test_an_answer_streams_and_the_request_is_what_the_page_shows(visit, stub):
    async def script(body):
        yield stubs.event("First words")
        await stub.opened()
        yield stubs.event(" and the rest")
        yield stubs.ending(stub.decision)

    stub.script = script
    page = visit()
    expect(page.locator("#model")).to_be_enabled()  # else a slow machine sends before the models are known
    send(page, "Say something")
    expect(last(page)).to_have_text("First words")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "true")
    stub.gate.set()
    expect(last(page)).to_have_text("First words and the rest")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
    (body,) = stub.bodies
    assert body["model"] == "robot"
    assert body["messages"] == [{"role": "user", "content": "Say something"}]
    assert (body["temperature"], body["max_tokens"]) == (0, 256)
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}


def test_stop_ends_the_request_and_the_next_message_works(visit, stub):
    async def script(body):
        yield stubs.event("It goes on")
        await stub.opened()

    stub.script = script
    page = visit()
    send(page, "Talk for ever")
    expect(last(page)).to_have_text("It goes on")
    expect(page.locator("#send")).to_be_hidden()
    page.locator("#stop").click()
    expect(last(page, ".waiting")).to_have_text("Stopped.")
    assert stub.left.wait(10), "the server was not told"
    expect(page.locator("#words")).to_be_focused()
    stub.script = stub.hello
    send(page, "And now?")
    expect(last(page)).to_have_text("Hello from the model")


def test_escape_stops_before_the_first_word(visit, stub):
    async def script(body):
        await stub.opened()
        yield ""

    stub.script = script
    page = visit()
    send(page, "Anyone?")
    expect(last(page, ".waiting")).to_contain_text("Waiting for the first word")
    page.keyboard.press("Escape")
    expect(last(page, ".waiting")).to_have_text("Stopped before the first word.")


@pytest.mark.parametrize(
    ("decision", "told"),
    [
        (stubs.EDGE, ["edge", "confident", "confidence 0.93", "cost 0 cloud tokens"]),
        (stubs.UNSURE, ["cloud", "unsure", "confidence 0.41", "cost 17 cloud tokens"]),
        (stubs.FALLBACK, ["fallback", "cloud timed out", "confidence 0.41", "cost 0 cloud tokens"]),
        (stubs.CLOUD, ["cloud", "attached", "cost 12 cloud tokens"]),
    ],
    ids=["edge", "unsure", "fallback", "attached"],
)
def test_the_badge_says_who_answered_why_and_at_what_cost(visit, stub, decision, told):
    stub.decision = decision
    page = visit()
    send(page, "Who are you?")
    facts = page.locator(".facts li")
    expect(facts).to_have_count(len(told) + 2)
    texts = [text.strip() for text in facts.all_inner_texts()]
    assert texts[: len(told)] == told
    assert texts[-2].endswith("s")
    assert texts[-1].endswith("tokens/s")
    expect(page.locator(".badge")).to_have_class(f"badge {decision['side']}")


def test_the_headers_alone_show_the_side_before_the_first_word(visit, stub):
    stub.decision = stubs.UNSURE

    async def script(body):
        await stub.opened()
        yield stubs.event("late", finish_reason="stop")

    stub.script = script
    page = visit()
    send(page, "Who will it be?")
    expect(page.locator(".badge")).to_have_text("cloud")
    expect(page.locator(".reason")).to_have_text("unsure")
    stub.gate.set()
    expect(last(page)).to_have_text("late")


def test_speed_is_tokens_over_the_whole_time(visit, stub):
    async def script(body):
        yield stubs.event("quick")
        yield stubs.ending(stub.decision, tokens=1_000_000)

    stub.script = script
    page = visit()
    send(page, "Fast")
    found = page.locator(".facts li").last
    expect(found).to_contain_text("tokens/s")
    seconds = page.locator(".facts li").nth(-2).inner_text()
    value, unit = seconds.split()
    told = float(found.inner_text().split()[0].replace(",", ""))
    assert told == pytest.approx(1e6 / (float(value) / (1000 if unit == "ms" else 1)), rel=0.2)


def test_earlier_messages_go_along_and_can_be_left_out(visit, stub):
    page = visit()
    send(page, "one")
    expect(last(page)).to_have_text("Hello from the model")
    send(page, "two")
    expect(page.locator(".answer[aria-busy=false]")).to_have_count(2)
    assert [message["role"] for message in stub.bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert stub.bodies[1]["messages"][1]["content"] == "Hello from the model"
    page.locator("#open-settings").click()
    page.locator("#memory").uncheck()
    page.locator("#close-settings").click()
    send(page, "three")
    expect(page.locator(".answer[aria-busy=false]")).to_have_count(3)
    assert stub.bodies[2]["messages"] == [{"role": "user", "content": "three"}]


def test_new_chat_forgets_what_was_said(visit, stub):
    page = visit()
    send(page, "one")
    expect(last(page)).to_have_text("Hello from the model")
    page.locator("#fresh").click()
    expect(page.locator(".answer")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    send(page, "two")
    expect(last(page)).to_have_text("Hello from the model")
    assert len(stub.bodies[1]["messages"]) == 1


def test_model_temperature_and_length_are_the_users(visit, stub):
    page = visit()
    page.locator("#model").select_option("base")
    page.locator("#open-settings").click()
    page.locator("#temperature").fill("0.7")
    expect(page.locator("#temperature-told")).to_have_text("0.7")
    page.locator("#max-tokens").fill("")
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    send(page, "hello")
    expect(last(page)).to_have_text("Hello from the model")
    (body,) = stub.bodies
    assert (body["model"], body["temperature"]) == ("base", 0.7)
    assert "max_tokens" not in body


def test_enter_sends_shift_enter_does_not_and_nothing_is_not_sent(visit, stub):
    page = visit()
    words = page.locator("#words")
    expect(words).to_be_focused()
    words.press("Enter")
    words.fill("   ")
    words.press("Enter")
    words.fill("first")
    words.press("Shift+Enter")
    words.press_sequentially("second")
    assert words.input_value() == "first\nsecond"
    words.press("Enter")
    expect(last(page)).to_have_text("Hello from the model")
    assert [body["messages"][0]["content"] for body in stub.bodies] == ["first\nsecond"]
    assert words.input_value() == ""


def test_while_an_answer_comes_the_next_message_waits_in_the_box(visit, stub):
    async def script(body):
        yield stubs.event("slow")
        await stub.opened()
        yield stubs.ending(stub.decision)

    stub.script = script
    page = visit()
    send(page, "one")
    expect(last(page)).to_have_text("slow")
    page.locator("#words").fill("two")
    page.locator("#words").press("Enter")
    assert page.locator("#words").input_value() == "two"
    assert len(stub.bodies) == 1
    stub.gate.set()
    expect(page.locator("#send")).to_be_visible()
    page.locator("#words").press("Enter")
    expect(page.locator(".answer[aria-busy=false]")).to_have_count(2)


SCRIPT = "<script>window.broken = 1</script><img src=x onerror='window.broken = 2'><a href='javascript:1'>x</a>"


def test_markup_stays_text_wherever_it_comes_from(visit, stub):
    stub.says(SCRIPT)
    stub.be_an_edge(kind=SCRIPT)
    stub.models = [SCRIPT, "robot"]
    stub.decision = {"side": "edge", "reason": SCRIPT, "confidence": 0.5, "cost": 1.0}
    stub.asked("edge", 0.1)
    stub.recent[0]["reason"] = SCRIPT
    page = visit()
    send(page, SCRIPT)
    expect(last(page)).to_have_text(SCRIPT)
    expect(page.locator(".question .said")).to_have_text(SCRIPT)
    expect(page.locator(".reason")).to_have_text(SCRIPT)
    expect(page.locator("#latency title")).to_contain_text("<script>")
    assert page.evaluate("window.broken") is None
    assert page.locator("body img, body a").count() == 0
    assert page.locator("body script").count() == 1


def test_right_to_left_text_emoji_and_several_lines_stand_as_they_are(visit, stub):
    stub.says("שלום עולם\n", "line two 👩‍🚀", "\n  indented")
    page = visit()
    send(page, "مرحبا")
    expect(page.locator("#send")).to_be_visible()
    expect(last(page, ".said")).to_contain_text("indented")
    assert last(page).evaluate("node => node.textContent") == "שלום עולם\nline two 👩‍🚀\n  indented"
    assert page.locator(".question .said").evaluate("node => getComputedStyle(node).direction") == "rtl"


def test_a_character_cut_in_the_middle_of_its_bytes_comes_out_whole(visit, stub):
    whole = (
        stubs.event("naïve 👋", finish_reason="stop").replace("\\u00ef", "ï").replace("\\ud83d\\udc4b", "👋").encode()
    )

    async def script(body):
        for place in range(0, len(whole), 7):
            yield whole[place : place + 7]

    stub.script = script
    page = visit()
    send(page, "hi")
    expect(last(page)).to_have_text("naïve 👋")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
def test_events_are_read_with_every_line_end_comment_and_field(visit, stub, end):
    piece = json.dumps({"choices": [{"delta": {"content": "read"}, "finish_reason": "stop"}]})
    first, second = piece.split(" ", 1)
    stub.sends(
        f": a comment{end}event: x{end}id: 1{end}data:{first}{end}", f"data: {second}{end}", end, f"data: [DONE]{end}"
    )
    page = visit()
    send(page, "hi")
    expect(last(page)).to_have_text("read")
    expect(page.locator(".answer.failed")).to_have_count(0)


def test_a_long_answer_is_followed_until_the_reader_scrolls_up(visit, stub):
    async def script(body):
        yield stubs.event("word " * 4000)
        await stub.opened()
        yield stubs.event("more " * 4000)
        yield stubs.ending(stub.decision)

    stub.script = script
    page = visit()
    send(page, "A long one")
    place = "node => Math.round(node.scrollHeight - node.scrollTop - node.clientHeight)"
    scroller = page.locator("#scroll")
    expect(last(page)).to_contain_text("word")
    assert waits_for(page, lambda: scroller.evaluate(place) < 5)
    scroller.evaluate("node => node.scrollTo(0, 0)")
    expect(page.locator("#down")).to_be_visible()
    stub.gate.set()
    expect(page.locator("#send")).to_be_visible()
    assert scroller.evaluate("node => node.scrollTop") == 0
    page.locator("#down").click()
    expect(page.locator("#down")).to_be_hidden()
    assert waits_for(page, lambda: scroller.evaluate(place) < 5)


def test_an_answer_cut_by_its_length_and_an_empty_one_say_so(visit, stub):
    async def cut(body):
        yield stubs.event("as far as")
        yield stubs.ending(stub.decision, finish_reason="length")

    stub.script = cut
    page = visit()
    send(page, "long")
    expect(last(page, ".waiting")).to_contain_text("reached its tokens at most")
    stub.says()
    send(page, "nothing")
    expect(last(page, ".waiting")).to_have_text("The answer is empty.")
