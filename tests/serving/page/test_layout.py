import re

import pytest

from tests.serving.page.acts import last, send

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
stubs = pytest.importorskip("tests.serving.page.stub", reason="fastapi is not installed")


PHONE = {"viewport": {"width": 360, "height": 640}, "is_mobile": True, "has_touch": True}
CONTRAST = """node => {
    const parse = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = (rgb) => {
        const [r, g, b] = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    let ground = node;
    while (ground && (parse(getComputedStyle(ground).backgroundColor)[3] ?? 1) === 0) ground = ground.parentElement;
    const style = getComputedStyle(node), ink = node.ownerSVGElement ? style.fill : style.color;
    const both = [light(parse(ink).slice(0, 3)), light(parse(getComputedStyle(ground).backgroundColor).slice(0, 3))];
    return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
}"""


def busy(stub):
    """Fill the page with everything that could be too wide."""
    stub.be_an_edge()
    stub.models = ["a-model-with-a-very-long-name-" * 6]
    stub.decision = {"side": "fallback", "reason": "cloud-timed-out-" * 12, "confidence": 0.5, "cost": 123456.789}
    stub.says("averylongwordwithoutanyplacetobreak" * 20, "\n", "| a | b |\n" * 3)
    stub.asked("edge", 0.1, 60)
    stub.asked("cloud", 12.0, 60)
    stub.asked("fallback", 900.0, 20)


@pytest.mark.parametrize("view", ["chat", "measures"])
def test_a_phone_of_360_pixels_needs_no_scrolling_sideways(visit, stub, view):
    busy(stub)
    page = visit(**PHONE)
    send(page, "https://example.org/" + "a" * 300)
    expect(page.locator(".answer[aria-busy=false]")).to_have_count(1)
    page.locator(f"#see-{view}").click()
    expect(page.locator("#latency svg" if view == "measures" else "#words")).to_be_visible()
    wide = page.evaluate("""() => [...document.querySelectorAll('body, body *')].filter((node) => {
        const box = node.getBoundingClientRect();
        return node.closest('.unseen, dialog') === null && box.width && (box.right > 360.5 || box.left < -0.5);
    }).map((node) => node.outerHTML.slice(0, 80))""")
    assert wide == []
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for scroller in ("#scroll", "aside"):
        assert page.locator(scroller).evaluate("node => node.scrollWidth <= node.clientWidth")


def test_faults_keys_and_settings_fit_a_phone_too(visit, stub, watch):
    watch.expected = ("401",)
    stub.key = "sk"
    page = visit(**PHONE)
    expect(page.locator("#lock")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator("#open-settings").click()
    box = page.locator("#settings").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    assert page.locator("#settings").evaluate("node => node.scrollWidth <= node.clientWidth")


def test_everything_to_be_touched_is_large_enough_on_a_phone(visit, stub):
    stub.be_an_edge()
    page = visit(**PHONE)
    for name in ("#model", "#fresh", "#open-settings", "#send", "#see-chat", "#see-measures"):
        box = page.locator(name).bounding_box()
        assert min(box["width"], box["height"]) >= 36, name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(visit, stub, watch, scheme):
    watch.expected = ("Failed to load resource",)
    stub.be_an_edge()
    stub.asked("edge", 0.1, 3)
    page = visit(color_scheme=scheme)
    for decision in (stubs.EDGE, stubs.UNSURE, stubs.FALLBACK):
        stub.decision = decision
        send(page, "hello")
        expect(page.locator(f".badge.{decision['side']}")).to_be_visible()
        expect(page.locator("#send")).to_be_visible()
    stub.refuse["/v1/chat/completions"] = stubs.refusal(500, "no")
    send(page, "hello")
    expect(last(page, ".fault span")).to_be_visible()
    names = (
        "h1, h2, #role, #link, #model, .said, .badge, .reason, .fault span, .facts li, #hint, #send, #rule, .plot text"
    )
    names += ", #promise, .ends span, .legend li, #latency-span, #share-words"
    poor = []
    for node in page.locator(names).all():
        if node.is_visible() and node.text_content().strip() and (ratio := node.evaluate(CONTRAST)) < 4.5:
            poor.append((ratio, node.evaluate("node => node.outerHTML.slice(0, 90)")))
    assert poor == []


def test_dark_and_light_differ(visit, stub):
    grounds = [
        visit(color_scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in ("light", "dark")
    ]
    light, dark = (sum(map(int, re.findall(r"\d+", ground)[:3])) for ground in grounds)
    assert light > 600 > 150 > dark


def test_the_keyboard_reaches_everything_and_shows_where_it_is(visit, stub):
    stub.be_an_edge()
    page = visit()
    expect(page.locator("#slider")).to_be_visible()
    reached = set()
    page.evaluate("document.activeElement.blur()")
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
        shown = page.evaluate(
            "(() => { const at = document.activeElement, box = at.id === 'words' ? at.parentElement : at;"
            " const { outlineStyle, boxShadow } = getComputedStyle(box);"
            " return outlineStyle !== 'none' || boxShadow !== 'none' })()"
        )
        assert shown or page.evaluate("document.activeElement === document.body")
    assert {"model", "fresh", "open-settings", "words", "send", "slider"} <= reached


def test_every_control_has_a_name_and_the_conversation_is_read_out(visit, stub):
    stub.be_an_edge()
    page = visit()
    page.locator("#open-settings").click()
    nameless = page.evaluate("""() => [...document.querySelectorAll('button, input, select, textarea')].filter((node) =>
        !node.getAttribute('aria-label') && !node.textContent.trim() && !node.labels?.length).map((node) => node.id)""")
    assert nameless == []
    expect(page.locator("#log")).to_have_attribute("aria-live", "polite")
    page.keyboard.press("Escape")
    expect(page.locator("#open-settings")).to_be_focused()


def test_plots_say_in_words_what_they_show(visit, stub):
    stub.be_an_edge()
    stub.asked("edge", 0.1, 3)
    page = visit()
    expect(page.locator("#curve svg")).to_have_attribute("aria-label", re.compile("96.0 %"))
    expect(page.locator("#latency svg")).to_have_attribute("aria-label", re.compile("edge 100 ms"))
    expect(page.locator("#shares svg")).to_have_attribute("aria-label", re.compile("promised 25 %"))


def test_plots_follow_the_width_of_the_window(visit, stub):
    stub.be_an_edge()
    page = visit(viewport={"width": 700, "height": 700})
    page.locator("#see-measures").click()
    expect(page.locator("#curve svg")).to_be_visible()
    wide = page.locator("#curve svg").get_attribute("viewBox")
    page.set_viewport_size({"width": 360, "height": 700})
    expect(page.locator("#curve svg")).not_to_have_attribute("viewBox", wide)


def test_the_page_is_one_file_that_asks_nobody_for_anything():
    text = stubs.PAGE.read_text()
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", text)
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|@import|url\(", text
    )
    assert set(re.findall(r"https?://[^\s\"'`<>)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "connect-src 'self'" in text


def test_the_browser_itself_refuses_markup_made_from_text_and_foreign_addresses(visit, watch):
    watch.expected = ("TrustedHTML", "Content Security Policy")
    page = visit()
    refused = "try { document.body.innerHTML = '<b>x</b>'; return false } catch { return true }"
    assert page.evaluate(f"() => {{ {refused} }}")
    assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"
    assert any("connect-src" in text for text in watch.messages)
    watch.urls = [url for url in watch.urls if not url.startswith("http://127.0.0.1:9/")]
