"""Server-sent events out of bytes that may be anything: bounded, strict, one clear error."""

import json
from collections.abc import AsyncIterator
from typing import Any

from shadowtune.serving.edge.breaker import CloudError

GARBAGE = "cloud sent garbage"
BROKE_OFF = "cloud broke off"
DONE = "[DONE]"
ODD = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError)
"""What reading something odd that was sent may raise."""


async def lines(chunks: AsyncIterator[bytes], max_line: int, max_body: int) -> AsyncIterator[bytes]:
    """Cut bytes into lines without their ends.

    Raises:
        CloudError: if a line or all of them are too long.
    """
    held, total = b"", 0
    async for chunk in chunks:
        total += len(chunk)
        *whole, held = (held + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r")
        if total > max_body:
            raise CloudError(GARBAGE, f"more than {max_body} bytes")
        if len(held) > max_line:
            raise CloudError(GARBAGE, f"a line of more than {max_line} bytes")
    if held:
        yield held


async def events(chunks: AsyncIterator[bytes], max_line: int, max_body: int) -> AsyncIterator[dict[str, Any]]:
    """Give the JSON objects of a stream up to its ``[DONE]``, which may be missing.

    Raises:
        CloudError: if something else comes, or an error is told.
    """
    async for line in lines(chunks, max_line, max_body):
        name, colon, value = line.partition(b":")
        if not line or not name or name in (b"event", b"id", b"retry"):
            continue  # the end of an event, a comment that keeps the connection alive, or what we do not need
        if name != b"data" or not colon:
            raise CloudError(GARBAGE, f"a line begins with {line[:20]!r}")
        text = value.strip()
        if text == DONE.encode():
            return
        yield _object(text)


def _object(text: bytes) -> dict[str, Any]:
    try:
        told = read_json(text)
    except ODD:
        raise CloudError(GARBAGE, f"no JSON: {text[:40]!r}") from None
    if not isinstance(told, dict):
        raise CloudError(GARBAGE, f"no object: {text[:40]!r}")
    if told.get("error"):
        raise CloudError("cloud failed", error_message(told))
    return told


def read_json(text: bytes) -> Any:
    """Read JSON as it is defined, without NaN and infinity; raises ValueError or RecursionError."""
    return json.loads(text, parse_constant=_no_number)


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def error_message(told: Any) -> str:
    """Return what an OpenAI-like error object says, on one line of at most 200 characters."""
    error = told.get("error", told) if isinstance(told, dict) else told
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message)[:2000].encode(errors="replace").decode().split())[:200]
