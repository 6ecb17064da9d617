"""An HTTP server with the routes of OpenAI's completions and chat. A session id keeps a stream's fast weights between requests."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from zoo.errors import ZooError
from zoo.serving.kept import KeptSession, KeptSessions, Messages
from zoo.serving.schemas import ApiError, ChatRequest, CompletionRequest, ErrorResponse, GenerationRequest
from zoo.sessions.pool import BusyError, SessionPool
from zoo.text.tokenizers import Bytes

try:
    import anyio.to_thread
    from fastapi import FastAPI, Request
    from fastapi import HTTPException as FastAPIHTTPException
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse, Response
    from prometheus_client import CONTENT_TYPE_LATEST
    from starlette.exceptions import HTTPException
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError:
    raise ZooError("serve: needs pip install 'sleep-zoo[serve]'") from None

from zoo.serving.answers import Answer, ChatBody, CompletionBody, EventStream
from zoo.serving.metrics import Metrics


@dataclass(frozen=True)
class Limits:
    """What one server takes on."""

    body: int = 2**20
    """Bytes of a request."""
    prompt: int = 32_768
    """Tokens of a request's prompt."""
    tokens: int = 4_096
    """Tokens of an answer."""
    idle: float = 3_600.0
    """Seconds after which a session that nobody asks may be forgotten."""


def make_app(pool: SessionPool, text: Bytes, name: str, limits: Limits | None = None) -> FastAPI:
    """The server of one model as an ASGI app. Closes the pool when it shuts down."""
    limits = limits or Limits()
    sessions = KeptSessions(pool, limits.idle)
    metrics = Metrics(sessions, pool)
    born = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = pool.streams + 16  # a thread for every stream that speaks
        yield
        pool.close()

    app = FastAPI(title="Sleep Zoo", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(_SmallBodies, limit=limits.body)

    def refuse(request: Request, refusal: ApiError) -> JSONResponse:
        metrics.requests.labels(_route(request), refusal.status).inc()
        return JSONResponse(refusal.body, refusal.status)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return refuse(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return refuse(
                request, ApiError(400, f"body: no JSON: {first['ctx']['error']}, character {first['loc'][-1]}", None, "json_invalid")
            )
        where = ".".join(str(part) for part in first["loc"][1:])
        return refuse(request, ApiError(400, f"{where}: {first['msg']}" if where else first["msg"], where or None, first["type"]))

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        answer = refuse(request, ApiError(error.status_code, str(error.detail)))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return refuse(request, ApiError(500, f"{type(error).__name__}: {error}"))

    errors: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}
    answers: dict[int | str, dict[str, Any]] = {
        200: {"content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {"type": "string"}}}},
        **errors,
    }

    @app.get("/v1/models", responses=errors)
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": born, "owned_by": "sleep-zoo"}]}

    @app.delete("/v1/sessions/{session}", responses=errors)
    def forget(session: str) -> dict[str, Any]:
        if not sessions.delete(session):
            raise ApiError(404, f"session: '{session}' does not exist, or is busy", "session", "session_not_found")
        return {"id": session, "object": "session", "deleted": True}

    @app.get("/metrics", response_class=PlainTextResponse)
    def numbers() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.post("/v1/completions", response_model=None, responses=answers)
    def completions(body: CompletionRequest, request: Request) -> Response:
        ids = text.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
        return generate(body, request, body.max_tokens, lambda kept: ids, CompletionBody(name))

    @app.post("/v1/chat/completions", response_model=None, responses=answers)
    def chat(body: ChatRequest, request: Request) -> Response:
        messages = [message.model_dump() for message in body.messages]
        tokens = body.max_completion_tokens or body.max_tokens or limits.tokens
        return generate(body, request, tokens, lambda kept: text.chat(kept.unread(messages)), ChatBody(name), messages)

    def generate(
        body: GenerationRequest,
        request: Request,
        max_tokens: int,
        prompt: Callable[[KeptSession], list[int]],
        response: CompletionBody,
        messages: Messages | None = None,
    ) -> Response:
        if body.model != name:
            raise ApiError(404, f"model: '{body.model}' does not exist; there is '{name}'", "model", "model_not_found")
        if max_tokens > limits.tokens:
            raise ApiError(400, f"max_tokens: {max_tokens} is more than {limits.tokens}", "max_tokens", "max_tokens_exceeded")
        with ExitStack() as cleanup:
            kept = sessions.acquire(body.session)
            cleanup.callback(sessions.release, body.session, kept)
            try:
                ids = prompt(kept)
                if len(ids) > limits.prompt:
                    raise ApiError(400, f"prompt: {len(ids)} tokens are more than {limits.prompt}", "prompt", "context_length_exceeded")
                answer = Answer(kept.session, ids, body, max_tokens, text, metrics)
            except ZooError as error:
                raise ApiError(409 if isinstance(error, BusyError) else 400, str(error)) from None
            if messages is not None:
                cleanup.callback(_remember, kept, messages, answer)
            cleanup.callback(answer.close)
            metrics.requests.labels(_route(request), 200).inc()
            if body.stream:
                end = cleanup.pop_all().close
                return EventStream(response.events(answer, end), end)
            return JSONResponse(response.whole(answer))

    return app


class _SmallBodies:
    """Refuses a request whose body is larger than the limit, before and while it is read."""

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
            refusal = ApiError(413, f"body: {int(declared)} bytes are more than {self.limit}", None, "request_too_large")
            await JSONResponse(refusal.body, refusal.status, {"connection": "close"})(scope, receive, send)
            return
        await self.app(scope, counted, send)


def _remember(kept: KeptSession, messages: Messages, answer: Answer) -> None:
    if answer.text is not None:
        kept.remember([*messages, {"role": "assistant", "content": answer.text}])


def _route(request: Request) -> str:
    route = request.scope.get("route")
    return getattr(route, "path", "other")
