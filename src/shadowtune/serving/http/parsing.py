"""Bodies are read as JSON is defined: UTF-8 without half characters, no NaN, and nested no deeper than anyone needs."""

from collections.abc import Callable, Coroutine
from typing import Any

import pydantic_core
from fastapi import HTTPException, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

MAX_BRACKETS = 100_000
"""Opening brackets of a body, those in texts included."""


class StrictJsonRequest(Request):
    """A request whose ``json`` is strict."""

    async def json(self) -> Any:
        """Read the body.

        Raises:
            HTTPException: with status 400, if it is not JSON, or more objects and lists than any request needs: a
                million of them keep the garbage collector busy for seconds.
        """
        body = await self.body()
        brackets = body.count(b"[") + body.count(b"{")
        if brackets > MAX_BRACKETS:
            raise HTTPException(400, f"the body has {brackets} opening brackets, of at most {MAX_BRACKETS}")
        try:
            return pydantic_core.from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(400, f"the body is not JSON: {error}") from None


class StrictJsonRoute(APIRoute):
    """A route that reads bodies so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Hand the original handler a strict request."""
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(StrictJsonRequest(request.scope, request.receive))

        return strictly
