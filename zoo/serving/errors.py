"""Error responses: every exception becomes a status and a body in OpenAI's form."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Collection, Sequence
from typing import Any

from fastapi import HTTPException as FastAPIHTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zoo.config import path_of, wanted
from zoo.serving.limits import is_import
from zoo.serving.schemas import WANTED, ApiError
from zoo.sessions.pool import PoolClosedError

MOST_SHOWN = 80  # characters of a value in an error


def as_api_error(error: Exception, asked: str = "") -> ApiError:
    """Return the response to an exception raised by a route or by the framework. asked: method and path of the request."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PoolClosedError):
        return ApiError(503, "the server is shutting down")
    if isinstance(error, HTTPException):
        unknown = error.status_code in (404, 405)
        return ApiError(error.status_code, f"{asked}: {error.detail}; GET /openapi.json lists the routes" if unknown else str(error.detail))
    if not isinstance(error, RequestValidationError):
        return ApiError(500, f"{type(error).__name__}: {error}")
    return _as_refusal(list(error.errors()))


def _as_refusal(errors: list[dict[str, Any]]) -> ApiError:
    """Return the response to the errors that pydantic found in a request. It names the field, its value and what is allowed."""
    unknown = [error for error in errors if error["type"] == "extra_forbidden" and len(error["loc"]) == 2]
    # in a union, the alternative that was meant is the one in which pydantic came furthest
    first = unknown[0] if unknown else max(errors, key=lambda error: len(error["loc"]))
    kind, place, message = first["type"], first["loc"], first["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        return ApiError(400, f"body: not JSON: {first['ctx']['error']}, character {place[-1]}", None, kind)
    if isinstance(first.get("input"), bytes):
        return ApiError(400, "body: its content type is not JSON; want Content-Type: application/json", None, "not_json")
    where = path_of(place[1:])
    if kind == "value_error":  # from a validator of the whole request
        named, _, message = message.partition(": ")
        where = f"{where}.{named}" if where else named
    elif kind == "extra_forbidden":
        message = "there is no such field"
    elif kind == "missing":
        message = "is missing"
    else:
        message = f"{_shown(first['input'])}; {message if kind == WANTED else wanted(kind, message, first.get('ctx', {}))}"
    return ApiError(400, f"{where or 'body'}: {message}", where or None, kind)


def _shown(value: Any) -> str:
    """Return the beginning of a value of a request, as JSON."""
    shown = json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace").decode()
    return shown if len(shown) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]}..."


class ApiKeys:
    """Middleware that refuses a request without one of the API keys.

    Args:
        public: paths that need none.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], public: Collection[str]) -> None:
        self.app, self.public = app, public
        self._expected = [f"Bearer {key}".encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self.public:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not sum(hmac.compare_digest(given, expected) for expected in self._expected):  # compares all of them
                error = ApiError(401, "authorization: no valid API key", None, "invalid_api_key")
                await JSONResponse(error.body, error.status, {"www-authenticate": "Bearer"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


class BodyLimit:
    """Middleware that refuses a request with a larger body, by its declared length or while it is read.

    Args:
        limit: maximum number of bytes.
        imports: maximum number of bytes of a session that is imported.
        draining: returns True if a body that has not arrived in full is refused.
    """

    def __init__(self, app: ASGIApp, limit: int, imports: int, draining: Callable[[], bool]) -> None:
        self.app, self.limit, self.imports, self.draining = app, limit, imports, draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.imports if is_import(scope["path"]) else self.limit
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise FastAPIHTTPException(413, f"body: more than {limit} bytes")
            if message.get("more_body") and self.draining():
                raise FastAPIHTTPException(503, "the server is shutting down")
            return message

        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            error = ApiError(413, f"body: {int(declared)} bytes are more than {limit}", None, "request_too_large")
            await JSONResponse(error.body, error.status, {"connection": "close"})(scope, receive, send)
            return
        await self.app(scope, counted, send)
