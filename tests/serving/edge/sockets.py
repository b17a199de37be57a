"""A scripted remote endpoint on a raw socket: it sends exactly the bytes of a test."""

import asyncio
import json
from contextlib import asynccontextmanager

STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
FOREVER = 3600


def event(told) -> bytes:
    """One server-sent event."""
    return b"data: " + (told if isinstance(told, bytes) else json.dumps(told).encode()) + b"\n\n"


def words(*texts: str, reason: str | None = "stop", usage=(5, 2)) -> bytes:
    """The events of a chat answer."""
    chunks = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}]
    chunks += [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
    if reason:
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        chunks.append({"choices": [], "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}})
    return b"".join(map(event, chunks)) + (event(b"[DONE]") if reason else b"")


def answer(*texts: str, **told) -> bytes:
    """A whole response."""
    return STREAM_HEAD + words(*texts, **told)


def refusal(status: int, message: str = "no", head: str = "") -> bytes:
    """A response with an error."""
    body = json.dumps({"error": {"message": message}}).encode()
    return (
        f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{head}content-length: {len(body)}\r\n\r\n".encode()
        + body
    )


class Socket:
    """What a fake endpoint received.

    Each request gets the next of ``script``, the last one again and again: bytes to send, or a coroutine function
    that is given reader and writer.
    """

    def __init__(self, script):
        self.script, self.bodies, self.paths, self.heads = list(script), [], [], []
        self.gone = asyncio.Event()
        """Set when a client closes before its answer ends."""
        self.url = ""

    async def handle(self, reader, writer):
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            self.paths.append(head.split()[1])
            length = next(
                (int(line[15:]) for line in head.lower().splitlines() if line.startswith("content-length:")), 0
            )
            self.bodies.append(json.loads(await reader.readexactly(length)) if length else None)
            step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
            else:
                await step(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.gone.set()
        finally:
            writer.close()


@asynccontextmanager
async def cloud_that(*script):
    """Serve a script on a free port."""
    fake = Socket(script)
    server = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.close()


async def hangs(reader, writer):
    """Send nothing until the client closes."""
    if not await reader.read(1):
        raise ConnectionError


def then_hangs(sent: bytes):
    """Send something, then nothing more until the client closes."""

    async def step(reader, writer):
        writer.write(sent)
        await hangs(reader, writer)

    return step


def drips(piece: bytes, head: bytes = STREAM_HEAD, pause: float = 0.01):
    """Send the same few bytes for ever."""

    async def step(reader, writer):
        writer.write(head)
        for _ in range(100_000):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)

    return step
