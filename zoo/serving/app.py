"""The HTTP server: OpenAI-compatible completions and chat. A session id keeps a stream's fast weights between requests."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from zoo.errors import ZooError
from zoo.sessions.pool import BusyError, SessionPool
from zoo.text.tokenizers import ByteTokenizer

try:
    import anyio.to_thread
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse, Response
    from prometheus_client import CONTENT_TYPE_LATEST
    from starlette.exceptions import HTTPException
except ImportError:
    raise ZooError("serve: needs pip install 'sleep-zoo[serve]'") from None

from zoo.serving.answers import Answer, ChatBody, CompletionBody, EventStream
from zoo.serving.errors import BodyLimit, as_api_error
from zoo.serving.kept import KeptSession, KeptSessions, Messages
from zoo.serving.metrics import Metrics
from zoo.serving.schemas import ApiError, ChatRequest, CompletionRequest, ErrorResponse, GenerationRequest

ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {"type": "string"}}}},
    **ERRORS,
}


@dataclass(frozen=True)
class Limits:
    """Limits of one server."""

    body: int = 2**20
    """Maximum size of a request's body, in bytes."""
    prompt: int = 32_768
    """Maximum number of tokens in a prompt."""
    tokens: int = 4_096
    """Maximum number of tokens in an answer."""
    idle: float = 3_600.0
    """Seconds without a request after which a session may be closed."""


def check_address(host: str, port: int) -> None:
    """Raise a ZooError if the server cannot listen at this address."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ZooError(f"host {host}, port {port}: {error.strerror}") from None


def make_app(pool: SessionPool, tokenizer: ByteTokenizer, name: str, limits: Limits | None = None) -> FastAPI:
    """Return the server of one model as an ASGI app. Closes the pool on shutdown."""
    server = Server(pool, tokenizer, name, limits or Limits())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = pool.streams + 16  # each generating stream holds a thread
        yield
        pool.close()

    app = FastAPI(title="Sleep Zoo", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, limit=server.limits.body)
    for kind in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, server.error)
    app.get("/v1/models", responses=ERRORS)(server.models)
    app.post("/v1/completions", response_model=None, responses=ANSWERS)(server.completions)
    app.post("/v1/chat/completions", response_model=None, responses=ANSWERS)(server.chat)
    app.delete("/v1/sessions/{session}", responses=ERRORS)(server.delete_session)
    app.get("/metrics", response_class=PlainTextResponse)(server.metrics_text)
    return app


class Server:
    """The routes of one model."""

    def __init__(self, pool: SessionPool, tokenizer: ByteTokenizer, name: str, limits: Limits) -> None:
        self.tokenizer, self.name, self.limits = tokenizer, name, limits
        self.sessions = KeptSessions(pool, limits.idle)
        self.metrics = Metrics(self.sessions, pool)
        self.created = int(time.time())

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": self.name, "object": "model", "created": self.created, "owned_by": "sleep-zoo"}]}

    def completions(self, body: CompletionRequest, request: Request) -> Response:
        ids = self.tokenizer.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
        return self._answer(body, request, body.max_tokens, lambda kept: ids, CompletionBody(self.name))

    def chat(self, body: ChatRequest, request: Request) -> Response:
        messages = [message.model_dump() for message in body.messages]
        max_tokens = body.max_completion_tokens or body.max_tokens or self.limits.tokens
        return self._answer(
            body, request, max_tokens, lambda kept: self.tokenizer.chat(kept.unread(messages)), ChatBody(self.name), messages
        )

    def delete_session(self, session: str) -> dict[str, Any]:
        if not self.sessions.delete(session):
            raise ApiError(404, f"session: '{session}' does not exist, or is busy", "session", "session_not_found")
        return {"id": session, "object": "session", "deleted": True}

    def metrics_text(self) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def error(self, request: Request, error: Exception) -> JSONResponse:
        refusal = as_api_error(error)
        self.metrics.requests.labels(_route(request), refusal.status).inc()
        return JSONResponse(refusal.body, refusal.status, getattr(error, "headers", None))

    def _answer(
        self,
        body: GenerationRequest,
        request: Request,
        max_tokens: int,
        prompt: Callable[[KeptSession], list[int]],
        response: CompletionBody,
        messages: Messages | None = None,
    ) -> Response:
        """Generate the answer to a request, with `prompt` as the tokens to read first. With `messages`, the session remembers them."""
        if body.model != self.name:
            raise ApiError(404, f"model: '{body.model}' does not exist; there is '{self.name}'", "model", "model_not_found")
        if max_tokens > self.limits.tokens:
            raise ApiError(400, f"max_tokens: {max_tokens} is more than {self.limits.tokens}", "max_tokens", "max_tokens_exceeded")
        with ExitStack() as cleanup:
            kept = self.sessions.acquire(body.session)
            cleanup.callback(self.sessions.release, body.session, kept)
            try:
                ids = prompt(kept)
                if len(ids) > self.limits.prompt:
                    raise ApiError(
                        400, f"prompt: {len(ids)} tokens are more than {self.limits.prompt}", "prompt", "context_length_exceeded"
                    )
                answer = Answer(kept.session, ids, body, max_tokens, self.tokenizer, self.metrics)
            except ZooError as error:
                raise ApiError(409 if isinstance(error, BusyError) else 400, str(error)) from None
            if messages is not None:
                cleanup.callback(_remember, kept, messages, answer)
            cleanup.callback(answer.close)
            self.metrics.requests.labels(_route(request), 200).inc()
            if body.stream:
                end = cleanup.pop_all().close
                return EventStream(response.events(answer, end), end)
            return JSONResponse(response.whole(answer))


def _remember(kept: KeptSession, messages: Messages, answer: Answer) -> None:
    if answer.text is not None:
        kept.remember([*messages, {"role": "assistant", "content": answer.text}])


def _route(request: Request) -> str:
    route = request.scope.get("route")
    return getattr(route, "path", "other")
