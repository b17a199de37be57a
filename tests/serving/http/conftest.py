"""Clients of apps with a fake backend, in this process."""

import pytest
from starlette.testclient import TestClient

from shadowtune.config.serving import ServerConfig
from shadowtune.serving.http.app import create_app
from tests.serving.http.fakes import FakeBackend


@pytest.fixture
def asking():
    """Makes clients of apps, which know the backend and the admission controller."""
    opened = []

    def make(backend=None, role="cloud", controls=None, **settings):
        backend = backend or FakeBackend()
        app = create_app(backend, ServerConfig(**settings), role, **(controls or {}))
        client = TestClient(app, raise_server_exceptions=False)
        client.__enter__()
        opened.append(client)
        client.backend, client.admission = backend, app.state.admission
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
