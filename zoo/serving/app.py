"""An HTTP server with the routes of OpenAI's completions and chat. A session id keeps a stream's fast weights between requests."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch

from zoo.errors import ZooError
from zoo.serving.kept import KeptSession, KeptSessions
from zoo.serving.schemas import ApiError, ChatRequest, CompletionRequest, ErrorResponse, GenerationRequest
from zoo.sessions.pool import BusyError, SessionPool
from zoo.text.tokenizers import Bytes

try:
    import anyio
    import anyio.to_thread
    from fastapi import FastAPI, Request
    from fastapi import HTTPException as FastAPIHTTPException
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
    from prometheus_client import CONTENT_TYPE_LATEST
    from starlette.exceptions import HTTPException
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError:
    raise ZooError("serve: needs pip install 'sleep-zoo[serve]'") from None

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
    def completions(ask: CompletionRequest, request: Request) -> Response:
        ids = text.encode(ask.prompt) if isinstance(ask.prompt, str) else ask.prompt
        shape = _Shape("cmpl", "text_completion", "text_completion", name, lambda piece: {"text": piece}, lambda piece: {"text": piece})
        return answer(ask, request, lambda kept: ids, ask.max_tokens, shape)

    @app.post("/v1/chat/completions", response_model=None, responses=answers)
    def chat(ask: ChatRequest, request: Request) -> Response:
        def new_ids(kept: KeptSession) -> list[int]:
            return text.chat(kept.unread([message.model_dump() for message in ask.messages]))

        shape = _Shape(
            "chatcmpl",
            "chat.completion",
            "chat.completion.chunk",
            name,
            lambda piece: {"message": {"role": "assistant", "content": piece}},
            lambda piece: {"delta": {"role": "assistant", "content": piece}},
        )
        return answer(ask, request, new_ids, ask.max_completion_tokens or ask.max_tokens or limits.tokens, shape)

    def answer(
        ask: GenerationRequest, request: Request, new_ids: Callable[[KeptSession], list[int]], tokens: int, shape: _Shape
    ) -> Response:
        if ask.model != name:
            raise ApiError(404, f"model: '{ask.model}' does not exist; there is '{name}'", "model", "model_not_found")
        if tokens > limits.tokens:
            raise ApiError(400, f"max_tokens: {tokens} is more than {limits.tokens}", "max_tokens", "max_tokens_exceeded")
        kept = sessions.acquire(ask.session)
        try:
            ids = new_ids(kept)
            if len(ids) > limits.prompt:
                raise ApiError(400, f"prompt: {len(ids)} tokens are more than {limits.prompt}", "prompt", "context_length_exceeded")
            speech = _Speech(kept, ids, ask, tokens, text, metrics)
            if isinstance(ask, ChatRequest):
                speech.messages = [message.model_dump() for message in ask.messages]
        except ZooError as error:
            sessions.release(ask.session, kept)
            raise ApiError(409 if isinstance(error, BusyError) else 400, str(error)) from None
        except BaseException:
            sessions.release(ask.session, kept)
            raise

        over = False

        def end() -> None:
            nonlocal over
            if not over:
                over = True
                speech.close()
                sessions.release(ask.session, kept)

        metrics.requests.labels(_route(request), 200).inc()
        if ask.stream:
            return _Events(shape.events(speech, end), end)
        try:
            return JSONResponse(shape.whole("".join(speech), speech))
        finally:
            end()

    return app


class _Speech:
    """One answer: pieces of text, cut where a stop word begins. The first token is there when it has been made."""

    def __init__(self, kept: KeptSession, ids: list[int], ask: GenerationRequest, tokens: int, text: Bytes, metrics: Metrics) -> None:
        self.prompt_tokens, self.tokens, self.finish = len(ids), 0, "length"
        self.messages: list[dict[str, str]] | None = None
        self._kept, self._metrics, self._text = kept, metrics, text
        self._stops = [ask.stop] if isinstance(ask.stop, str) else ask.stop or []
        started = time.perf_counter()
        self._ids = kept.session.generate(
            torch.tensor([ids], dtype=torch.int64) if ids else None,
            tokens,
            stop=text.stop,
            temperature=ask.temperature,
            top_p=ask.top_p,
            top_k=ask.top_k,
            repetition_penalty=ask.repetition_penalty,
            seed=ask.seed,
        )
        self._first = int(next(self._ids))
        self._at = time.perf_counter()
        metrics.first_token.observe(self._at - started)
        metrics.tokens.labels("prompt").inc(len(ids))

    def close(self) -> None:
        self._ids.close()  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[str]:
        said, sent = "", 0
        for piece in self._pieces():
            said += piece
            ends = [at for stop in self._stops if (at := said.find(stop, max(0, sent - len(stop)))) >= 0]
            if ends:
                self.finish, said = "stop", said[: min(ends)]
                break
            certain = len(said) - max((len(stop) - 1 for stop in self._stops), default=0)
            if certain > sent:
                yield said[sent:certain]
                sent = certain
        if said[sent:]:
            yield said[sent:]
        if self.messages is not None:
            self._kept.remember([*self.messages, {"role": "assistant", "content": said}])

    def _pieces(self) -> Iterator[str]:
        decode, token = self._text.decoder(), self._first
        while True:
            self.tokens += 1
            self._metrics.tokens.labels("completion").inc()
            if token in self._text.stop:
                self.finish = "stop"
                return
            yield decode(token)
            following = next(self._ids, None)
            if following is None:
                return
            token, now = int(following), time.perf_counter()
            self._metrics.next_token.observe(now - self._at)
            self._at = now

    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens, "total_tokens": self.prompt_tokens + self.tokens}


class _Shape:
    """How a route writes its answers."""

    def __init__(self, prefix: str, kind: str, chunk: str, model: str, whole: Callable[[str], Any], part: Callable[[str], Any]) -> None:
        self._id, self._kind, self._chunk = f"{prefix}-{uuid.uuid4().hex}", kind, chunk
        self._model, self._whole, self._part = model, whole, part
        self._created = int(time.time())

    def _frame(self, kind: str, choice: dict[str, Any], finish: str | None) -> dict[str, Any]:
        choices = [{"index": 0, "finish_reason": finish, "logprobs": None, **choice}]
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def whole(self, said: str, speech: _Speech) -> dict[str, Any]:
        return {**self._frame(self._kind, self._whole(said), speech.finish), "usage": speech.usage()}

    def events(self, speech: _Speech, end: Callable[[], None]) -> Iterator[str]:
        try:
            for piece in speech:
                yield f"data: {json.dumps(self._frame(self._chunk, self._part(piece), None))}\n\n"
            end()  # before the client hears of it: its next request may be here at once
            yield f"data: {json.dumps({**self._frame(self._chunk, self._part(''), speech.finish), 'usage': speech.usage()})}\n\n"
        except Exception as error:  # the status has been sent
            yield f"data: {json.dumps(ApiError(500, str(error)).body)}\n\n"
        yield "data: [DONE]\n\n"


class _Events(StreamingResponse):
    """Server-sent events; `end` is called when they have been sent, or the client has left."""

    def __init__(self, events: Iterator[str], end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._end)


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


def _route(request: Request) -> str:
    route = request.scope.get("route")
    return getattr(route, "path", "other")
