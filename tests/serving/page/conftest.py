"""A browser, and a check around each test: no console errors, no requests to other origins."""

import shutil

import pytest

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 10_000  # ms; a page is never waited for longer, and no test waits when all is well


@pytest.fixture(scope="module")  # no longer: its event loop would stand in the way of asyncio.run
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if shutil.which(CHROMIUM) is None:
        pytest.skip(f"{CHROMIUM} is not installed")
    sync_api.expect.set_options(timeout=PATIENCE)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def stub():
    pytest.importorskip("fastapi", reason="fastapi is not installed: pip install shadowtune[serve]")
    from tests.serving.page.stub import Stub

    return Stub()


@pytest.fixture
def server(stub):
    from tests.serving.page.stub import Running, app

    running = Running(app(stub))
    yield running
    stub.gate.set()
    running.stop()


class Watch:
    """What a page said to its console, and where it sent requests."""

    def __init__(self):
        self.messages, self.urls = [], []
        self.expected = ()
        """Parts of messages that a test provokes."""

    def over(self, page):
        page.on("console", lambda message: self.messages.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        page.on("request", lambda request: self.urls.append(request.url))
        return page

    def faults(self):
        return [text for text in self.messages if not any(part in text for part in self.expected)]


@pytest.fixture
def watch():
    return Watch()


@pytest.fixture
def visit(browser, server, watch):
    """Open the page; the arguments are those of a browser context. Afterwards: a quiet console, one origin."""
    contexts = []

    def opened(**options):
        contexts.append(browser.new_context(**options))
        page = watch.over(contexts[-1].new_page())
        page.goto(server.url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not watch.faults()
    assert watch.urls
    assert all(url.startswith((server.url, "data:")) for url in watch.urls)
