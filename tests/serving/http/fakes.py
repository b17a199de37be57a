"""A backend without a model, whose failures can be requested, and a real server around it."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shadowtune.config.serving import ServerConfig
from shadowtune.serving.http.app import create_app
from shadowtune.serving.http.server import address_of, bind, make_server
from shadowtune.serving.requests import (
    GeneratedToken,
    GenerationRequest,
    ModelCard,
    OutputChunk,
    RequestError,
    RoutingDecision,
    Usage,
)

SECRET = "the prompt that nobody may see"
MODELS = ("echo", "hang", "refuse", "full", "fail", "late", "bug", "late-bug", "mute", "slow")


def words_of(request: GenerationRequest) -> list[str]:
    """What the fake answers: the words of the prompt, or its token ids."""
    given = request.prompt if request.messages is None else request.messages[-1]["content"] or ""
    return given.split() if isinstance(given, str) else [str(token) for token in given]


@dataclass
class FakeStream:
    """Says the prompt's words, one a piece, with the logarithm of a probability of 1/2, 1/4, ..."""

    request: GenerationRequest
    owner: "FakeBackend"
    decision: RoutingDecision
    closed: bool = False

    async def __aiter__(self) -> AsyncIterator[OutputChunk]:
        model, words = self.request.model, words_of(self.request)
        if model == "fail":
            raise RequestError("the pass failed", 500)
        if model == "bug":
            raise ValueError(SECRET)
        if model == "mute":
            await asyncio.sleep(3600)
        said, finish = 0, "stop"
        for number, word in enumerate(words):
            if word in self.request.stop:
                break
            if self.request.max_tokens is not None and number == self.request.max_tokens:
                finish = "length"
                break
            text = word if number == 0 else f" {word}"
            tokens: tuple[GeneratedToken, ...] = ()
            if self.request.top_logprobs is not None:
                top = tuple((other, f"t{other}", -1.0 * other) for other in range(self.request.top_logprobs))
                tokens = (GeneratedToken(number, text, float("-inf") if word == "never" else -0.5 * (number + 1), top),)
            yield OutputChunk(text, tokens)
            said += 1
            if model == "late":
                raise RequestError("the pass failed", 500)
            if model == "late-bug":
                raise ValueError(SECRET)
            if model == "hang":
                await asyncio.sleep(3600)
            if model == "slow":
                await asyncio.sleep(self.owner.pause)
        accepted = 0 if self.request.prediction is None else len(str(self.request.prediction).split())
        yield OutputChunk("", (), finish, Usage(len(words), said, accepted, 1 if accepted else 0))

    async def aclose(self) -> None:
        self.closed = True


@dataclass
class FakeBackend:
    """Remembers what it was asked."""

    pause: float = 0.05
    decision: RoutingDecision = field(default_factory=lambda: RoutingDecision("cloud", "attached", None, 1.5))
    answers: list[FakeStream] = field(default_factory=list)
    closed: bool = False

    def models(self) -> list[ModelCard]:
        return [ModelCard(name, 1700000000, 64, "tiny") for name in MODELS]

    async def generate(self, request: GenerationRequest) -> FakeStream:
        if request.model not in MODELS:
            raise RequestError(f"no model {request.model!r}", 404, "model")
        if request.model == "refuse":
            raise RequestError("the prompt has 99 tokens", 400, "messages")
        if request.model == "full":
            raise RequestError("the queue is full", 429)
        answer = FakeStream(request, self, self.decision)
        self.answers.append(answer)
        return answer

    async def aclose(self) -> None:
        self.closed = True

    @property
    def asked(self) -> list[GenerationRequest]:
        return [answer.request for answer in self.answers]


@dataclass
class FakePolicy:
    """A policy with a threshold."""

    threshold: float = 0.5

    def describe(self) -> Mapping[str, Any]:
        point = {"threshold": 0.5, "accuracy": 0.9, "deferral_rate": 0.2, "cost": 3.0}
        return {"kind": "confidence", "threshold": self.threshold, "signal": "logprob", "curve": [point]}

    def set_threshold(self, threshold: float) -> None:
        if not 0 <= threshold <= 1:
            raise RequestError(f"threshold must be from 0 to 1, got {threshold:g}", param="threshold")
        self.threshold = threshold


@dataclass
class FakeAdapters:
    """Adapters by name."""

    loaded: dict[str, str] = field(default_factory=dict)

    async def load(self, name: str, path: str) -> None:
        if "nothing" in path:
            raise RequestError(f"{path} holds no adapter", 400, "path")
        self.loaded[name] = path

    async def unload(self, name: str) -> None:
        if self.loaded.pop(name, None) is None:
            raise RequestError(f"no adapter {name!r}", 404, "name")


@dataclass
class Live:
    """A server that runs."""

    url: str
    backend: Any
    server: Any
    thread: threading.Thread

    def stop(self) -> None:
        self.server.drain()


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until it holds: a client has the last byte of a reply before the server has tidied up after it."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def serving(backend: Any = None, config: ServerConfig | None = None, **controls: Any) -> Iterator[Live]:
    """A real server on a free port."""
    config = config or ServerConfig(port=0)
    backend = backend or FakeBackend()
    app = create_app(backend, config, "cloud", **controls)
    ready = threading.Event()
    with bind(config) as bound:
        server = make_server(app, config, ready.set)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        assert ready.wait(20)
        live = Live(address_of(bound), backend, server, thread)
        try:
            yield live
        finally:
            live.stop()
            thread.join(30)
    assert not thread.is_alive()
    assert backend.closed
