"""Actions on the page and locators that several tests share."""

import pytest

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


def send(page, text):
    """Write a message and send it, once no answer is on its way: until then the page keeps what is written."""
    expect(page.locator("#stop")).to_be_hidden()
    page.locator("#words").fill(text)
    page.locator("#words").press("Enter")


def last(page, part=".said"):
    return page.locator(f".answer {part}").last


def waits_for(page, happened):
    """Whether it happens in a moment; a server's side cannot be waited for in the page."""
    for _ in range(200):
        if happened():
            return True
        page.wait_for_timeout(25)
    return False
