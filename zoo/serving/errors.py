"""Error responses: every exception becomes a status and a body in OpenAI's form."""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence

from fastapi import HTTPException as FastAPIHTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zoo.serving.schemas import ApiError
from zoo.sessions.pool import PoolClosedError


def as_api_error(error: Exception) -> ApiError:
    """Return the response to an exception raised by a route or by the framework."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PoolClosedError):
        return ApiError(503, "the server is shutting down")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    if not isinstance(error, RequestValidationError):
        return ApiError(500, f"{type(error).__name__}: {error}")
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"body: not JSON: {first['ctx']['error']}, character {first['loc'][-1]}", None, "json_invalid")
    # pydantic adds the alternatives of a union, such as `str` and `list[int]`
    where = ".".join(str(part) for part in first["loc"][1:] if not re.search(r"^(str|float|int|dict)$|[\[\](]", str(part)))
    message = "there is no such field" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        named = message.partition(":")[0]
        where, message = f"{where}.{named}" if where else named, message.partition(": ")[2]
    return ApiError(400, f"{where}: {message}" if where else message, where or None, first["type"])


class ApiKeys:
    """Middleware that refuses a request without one of the API keys. /health and /ready need none."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self._expected = [f"Bearer {key}".encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in ("/health", "/ready"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not sum(hmac.compare_digest(given, expected) for expected in self._expected):  # compares all of them
                error = ApiError(401, "authorization: no valid API key", None, "invalid_api_key")
                await JSONResponse(error.body, error.status, {"www-authenticate": "Bearer"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


class BodyLimit:
    """Middleware that refuses a request whose body is larger than `limit` bytes, by its declared length or while it is read."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limit:
                raise FastAPIHTTPException(413, f"body: more than {self.limit} bytes")
            return message

        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limit:
            error = ApiError(413, f"body: {int(declared)} bytes are more than {self.limit}", None, "request_too_large")
            await JSONResponse(error.body, error.status, {"connection": "close"})(scope, receive, send)
            return
        await self.app(scope, counted, send)
