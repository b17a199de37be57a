"""A server with the documented endpoints and no model, whose responses the test chooses."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

import shadowtune.serving

PAGE = Path(shadowtune.serving.__file__).parent / "page" / "index.html"
CURVE = [
    {"threshold": 0.0, "accuracy": 0.90, "deferral_rate": 0.0, "cost": 0.0},
    {"threshold": 0.5, "accuracy": 0.93, "deferral_rate": 0.1, "cost": 2.0},
    {"threshold": 0.7, "accuracy": 0.96, "deferral_rate": 0.25, "cost": 5.0},
    {"threshold": 0.9, "accuracy": 0.97, "deferral_rate": 0.6, "cost": 12.0},
    {"threshold": 1.0, "accuracy": 0.975, "deferral_rate": 1.0, "cost": 20.0},
]
CLOUD = {"side": "cloud", "reason": "attached", "confidence": None, "cost": 12.0}
EDGE = {"side": "edge", "reason": "confident", "confidence": 0.93, "cost": 0.0}
UNSURE = {"side": "cloud", "reason": "unsure", "confidence": 0.41, "cost": 17.0}
FALLBACK = {"side": "fallback", "reason": "cloud timed out", "confidence": 0.41, "cost": 0.0}

Script = Callable[[dict[str, Any]], AsyncIterator[str]]


def event(text: str | None = None, **more: Any) -> str:
    """One server-sent event of an answer; ``more`` stands beside the choices."""
    finish = more.pop("finish_reason", None)
    choices = (
        [] if text is None and finish is None else [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]
    )
    return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': choices, **more})}\n\n"


def ending(decision: dict[str, Any], tokens: int = 4, finish_reason: str = "stop") -> str:
    usage = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}
    return event("", finish_reason=finish_reason) + event(usage=usage, shadowtune=decision) + "data: [DONE]\n\n"


class Stub:
    """The server's state, read at every request."""

    def __init__(self) -> None:
        self.role, self.key, self.models = "cloud", None, ["robot", "base"]
        self.decision: dict[str, Any] = CLOUD
        self.policy: dict[str, Any] | None = None
        self.recent: list[dict[str, Any]] = []
        self.bodies: list[dict[str, Any]] = []
        self.puts: list[float] = []
        self.slow_put = False
        """Whether the first threshold is taken only once the gate is open."""
        self.left = threading.Event()
        """Set once a client went away in the middle of an answer."""
        self.gate = threading.Event()
        """What a script may wait for."""
        self.refuse: dict[str, Response] = {}
        """Path -> what is answered instead."""
        self.script: Script = self.hello

    def be_an_edge(self, **policy: Any) -> None:
        self.role, self.decision = "edge", EDGE
        self.policy = {"kind": "confidence", "threshold": 0.7, "signal": "logprob", "curve": CURVE, **policy}

    async def opened(self) -> None:
        while not self.gate.is_set():
            await asyncio.sleep(0.01)

    async def hello(self, body: dict[str, Any]) -> AsyncIterator[str]:
        for word in ("Hello", " from", " the", " model"):
            yield event(word)
        yield ending(self.decision)

    def says(self, *parts: str) -> None:
        """Let every answer be these parts."""

        async def script(body: dict[str, Any]) -> AsyncIterator[str]:
            for part in parts:
                yield event(part)
            yield ending(self.decision)

        self.script = script

    def sends(self, *pieces: str) -> None:
        """Let every answer be these bytes, whatever they are."""

        async def script(body: dict[str, Any]) -> AsyncIterator[str]:
            for piece in pieces:
                yield piece
                await asyncio.sleep(0.02)

        self.script = script

    def asked(self, side: str, seconds: float, number: int = 1) -> None:
        """Let that many requests have come in lately."""
        base = {"time": time.time(), "model": "robot", "reason": "sure", "confidence": 0.9, "cost": 1.0}
        counts = {"first_token_seconds": seconds, "prompt_tokens": 5, "completion_tokens": 5}
        self.recent += [{**base, **counts, "side": side, "seconds": seconds} for _ in range(number)]

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        try:
            async for piece in self.script(body):
                yield piece
        except (asyncio.CancelledError, GeneratorExit):
            self.left.set()
            raise


def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": None}}, status, headers)


def app(stub: Stub) -> FastAPI:
    api = FastAPI()

    @api.middleware("http")
    async def doorkeeper(request: Request, call_next: Any) -> Response:
        path = request.url.path
        if path in stub.refuse:
            return stub.refuse[path]
        if stub.key and path.startswith("/v1") and request.headers.get("authorization") != f"Bearer {stub.key}":
            return refusal(401, "missing or wrong API key")
        return await call_next(request)

    @api.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text())

    @api.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok", "role": stub.role}

    @api.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0} for name in stub.models]}

    @api.get("/v1/recent")
    def recent() -> dict[str, Any]:
        return {"requests": stub.recent[-200:]}

    @api.get("/v1/policy")
    def policy() -> Any:
        return stub.policy or refusal(404, "no policy here")

    @api.put("/v1/policy")
    async def put_policy(request: Request) -> Any:
        threshold = (await request.json())["threshold"]
        stub.puts.append(threshold)
        if stub.slow_put and len(stub.puts) == 1:
            await stub.opened()
        stub.policy["threshold"] = threshold
        return stub.policy

    @api.post("/v1/chat/completions")
    async def chat(request: Request) -> StreamingResponse:
        body = await request.json()
        stub.bodies.append(body)
        decision = {name: str(value) for name, value in stub.decision.items() if value is not None}
        headers = {f"x-shadowtune-{name}": value for name, value in decision.items()}
        return StreamingResponse(stub.stream(body), media_type="text/event-stream", headers=headers)

    return api


class Running:
    """A uvicorn server in a thread of its own, on a port that was free."""

    def __init__(self, api: FastAPI, port: int = 0) -> None:
        config = uvicorn.Config(api, host="127.0.0.1", port=port, log_level="critical", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
