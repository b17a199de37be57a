"""An app with a fake answerer, asked in this process."""

import pytest
from starlette.testclient import TestClient

from shadowtune.config.serving import ServerConfig
from shadowtune.serving.http.app import create_app
from tests.serving.http.fakes import FakeAnswerer


@pytest.fixture
def asking():
    """Makes clients of apps; their ``app_state`` holds the answerer's memory."""
    opened = []

    def make(answerer=None, role="cloud", controls=None, **settings):
        answerer = answerer or FakeAnswerer()
        app = create_app(answerer, ServerConfig(**settings), role, **(controls or {}))
        client = TestClient(app, raise_server_exceptions=False)
        client.__enter__()
        opened.append(client)
        client.answerer, client.desk = answerer, app.state.desk
        return client

    yield make
    for client in opened:
        client.__exit__(None, None, None)


@pytest.fixture
def chat():
    """A body of the chat API."""

    def body(text="to be or not", model="echo", **fields):
        return {"model": model, "messages": [{"role": "user", "content": text}], **fields}

    return body
