"""The HTTP server: OpenAI-compatible completions and chat. A session id keeps a stream's fast weights between requests."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils._pytree import tree_leaves

from zoo.errors import ZooError
from zoo.sessions.pool import BusyError, PoolClosedError, SessionPool
from zoo.text.json_schema import JsonSchema
from zoo.text.tokenizers import ByteTokenizer

try:
    import anyio.to_thread
    from fastapi import Depends, FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse, Response
    from prometheus_client import CONTENT_TYPE_LATEST
    from starlette.exceptions import HTTPException
except ImportError:
    raise ZooError("serve: needs pip install 'sleep-zoo[serve]'") from None

from zoo.serving.answers import Answer, Prompt
from zoo.serving.bodies import ChatBody, Choice, CompletionBody, EventStream
from zoo.serving.browsers import protect
from zoo.serving.conversations import chat_ids, message_ends, takes_tools
from zoo.serving.errors import ApiKeys, BodyLimit, as_api_error
from zoo.serving.kept import KeptSession, Messages
from zoo.serving.leaving import notice
from zoo.serving.limits import Limits
from zoo.serving.methods import HeadAsGet, methods_of
from zoo.serving.metrics import Metrics
from zoo.serving.owners import owner_of
from zoo.serving.page import FILES, add_page
from zoo.serving.prefixes import Prefixes, common_length
from zoo.serving.schemas import NAME, NAMES, ApiError, ChatRequest, CompletionRequest, ErrorResponse
from zoo.serving.session_routes import SessionRoutes
from zoo.serving.sessions import KeptSessions
from zoo.serving.store import Store
from zoo.sessions.file import identity
from zoo.sessions.host import WindowFullError
from zoo.sessions.sleeping_model import SleepingModel, sleeping_model

if TYPE_CHECKING:
    from zoo.serving.traces import Traces

ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": {"type": "string"}}}},
    **ERRORS,
}
MOST_CONVERSATION = 2**24  # bytes of the tokens and messages of a session that is imported
SESSION_HEADERS = ("x-session-id", "x-openwebui-chat-id")


def make_app(
    pool: SessionPool,
    tokenizer: ByteTokenizer,
    name: str,
    limits: Limits | None = None,
    *,
    keys: Sequence[str] = (),
    store: str | Path | None = None,
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
    page: bool = True,
    traces: Traces | None = None,
) -> FastAPI:
    """Return the server of one model as an ASGI app, with the `Server` as `app.state.server`. Closes the pool and the traces on shutdown.

    Args:
        keys: API keys. If there are any, every request except those for /health, /ready and the files of the page needs one.
        store: folder or URL of an object store that keeps sessions after the process ends.
        hosts, origins: names of the server, and web pages that may use it; see `browsers.protect`.
        page: serve a page for a browser at /.
        traces: records every request that reaches the model.
    Raises:
        ZooError: a bad key, host, origin or store.
    """
    if unusable := [key for key in keys if not re.fullmatch("[!-~]+", key)]:
        raise ZooError(f"api_key: {unusable[0]!r}; want at least one character, all ASCII and none a space")
    server = Server(pool, tokenizer, name, limits or Limits(), store, traces)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.sessions.tend()
        # every request that generates or waits holds a thread
        anyio.to_thread.current_default_thread_limiter().total_tokens = pool.streams + server.limits.queue + 16
        yield
        await anyio.to_thread.run_sync(server.sessions.close)
        pool.close()
        if traces is not None:
            await anyio.to_thread.run_sync(traces.close)

    app = FastAPI(title="Sleep Zoo", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.server = server
    app.add_middleware(HeadAsGet)
    app.add_middleware(BodyLimit, limit=server.limits.body, imports=server.largest_session, draining=lambda: server.draining)
    app.state.keyed = bool(keys)
    if keys:
        app.add_middleware(ApiKeys, keys=keys, public=("/health", "/ready", *FILES))
    protect(app, hosts, origins)
    for kind in (ApiError, PoolClosedError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, server.error)
    app.get("/health", responses=ERRORS)(server.health)
    app.get("/ready", responses=ERRORS)(server.ready)
    app.get("/v1/models", responses=ERRORS)(server.models)
    app.get("/v1/models/{model}", responses=ERRORS)(server.one_model)
    answers: dict[str, Any] = {"response_model": None, "responses": ANSWERS, "dependencies": [Depends(notice)]}
    app.post("/v1/completions", **answers)(server.completions)
    app.post("/v1/chat/completions", **answers)(server.chat)
    SessionRoutes(server.sessions, pool, server.settings).add(app, ERRORS)
    app.get("/metrics", response_class=PlainTextResponse)(server.metrics_text)
    if page:
        add_page(app)
    return app


class Server:
    """The routes of one model."""

    def __init__(
        self, pool: SessionPool, tokenizer: ByteTokenizer, name: str, limits: Limits, store: str | Path | None, traces: Traces | None
    ) -> None:
        self.tokenizer, self.name, self.limits, self.traces = tokenizer, name, limits, traces
        self.pool = pool
        model = sleeping_model(pool.model)
        due = pool.schedule.due(model.config.window)
        self.settings = {} if due == model.config.window else {"sleeps_after": "no number of tokens" if due is None else f"{due} tokens"}
        kept_in = None if store is None else Store(store, {**identity(model), "dtype": _dtype(model), **self.settings})
        self.sessions = KeptSessions(pool, limits.idle, Prefixes(limits.prefixes), kept_in, queue=limits.queue, wait=limits.wait)
        self.metrics = Metrics(self.sessions, pool)
        self.largest_session = pool.bytes // pool.streams + MOST_CONVERSATION
        """Maximum size of a session that is imported, in bytes."""
        self.created = int(time.time())
        self.draining = self.over = False
        """True once the server is shutting down: requests in progress are answered, new ones are refused; once those are cut short."""

    def cut_short(self) -> None:
        """End all requests in progress."""
        self.over = True
        self.pool.close()
        self.sessions.wake()

    def health(self) -> dict[str, str]:
        return {"status": "ok"}

    def ready(self) -> dict[str, str]:
        if self.draining:
            raise ApiError(503, "the server is shutting down")
        if self.sessions.failing:
            raise ApiError(503, "sessions cannot be stored")
        return {"status": "ok"}

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self.one_model(self.name)]}

    def one_model(self, model: str) -> dict[str, Any]:
        self._check_model(model)
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "sleep-zoo"}

    def completions(self, body: CompletionRequest, request: Request) -> Response:
        prompts = [self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]
        response = CompletionBody(self.name, body.top, _wants_usage(body))

        def all_prompts(kept: KeptSession) -> list[Prompt]:
            if kept.name is not None and len(prompts) > 1:
                raise ApiError(400, f"prompt: {len(prompts)} prompts; want 1 in a session", "prompt")
            return [Prompt([*kept.tokens, *ids], len(ids)) for ids in prompts]

        return self._answer(body, request, response, body.max_tokens, all_prompts)

    def chat(self, body: ChatRequest, request: Request) -> Response:
        tools = body.tools if body.tool_choice != "none" else None
        if tools and not takes_tools(self.tokenizer):
            raise ApiError(400, f"tools: the chat template of {self.name} does not take them", "tools", "unsupported_parameter")
        messages = [message.fields() for message in body.messages]

        def conversation(kept: KeptSession) -> list[Prompt]:
            if body.append:
                if kept.name is None:
                    raise ApiError(400, "append: only with a session", "append")
                messages[:0] = kept.messages
            ids = chat_ids(self.tokenizer, messages, tools)
            return [Prompt(ids, len(ids), lambda: message_ends(self.tokenizer, messages, tools, ids))]

        schema = body.response_format and body.response_format.json_schema
        try:
            compiled = JsonSchema(schema.schema_, self.tokenizer, self.pool.model.config.vocab_size) if schema else None
        except ZooError as error:
            raise ApiError(400, f"response_format: {error}", "response_format", "schema_refused") from None
        max_tokens = body.max_completion_tokens or body.max_tokens or self.limits.tokens
        response = ChatBody(self.name, body.top, _wants_usage(body))
        return self._answer(body, request, response, max_tokens, conversation, messages, compiled)

    def metrics_text(self) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def error(self, request: Request, error: Exception) -> JSONResponse:
        refusal = as_api_error(error, f"{request.method} {request.url.path}")
        self.metrics.requests.labels(_route(request), refusal.status).inc()
        headers = {"allow": methods_of(request)} if refusal.status == 405 else refusal.headers or getattr(error, "headers", None)
        return JSONResponse(refusal.body, refusal.status, headers)

    def _answer(
        self,
        body: CompletionRequest | ChatRequest,
        request: Request,
        response: CompletionBody,
        max_tokens: int,
        prompts: Callable[[KeptSession], list[Prompt]],
        messages: Messages | None = None,
        schema: JsonSchema | None = None,
    ) -> Response:
        """Answer the prompts of a request. With `messages`, the session remembers them and the answer; with `schema`, it is JSON."""
        self._check_model(body.model)
        if self.draining:
            raise ApiError(503, "the server is shutting down")
        if max_tokens > self.limits.tokens:
            field = "max_tokens" if body.max_tokens == max_tokens else "max_completion_tokens"
            raise ApiError(400, f"{field}: {max_tokens} is more than {self.limits.tokens}", field, "max_tokens_exceeded")
        vocabulary = self.pool.model.config.vocab_size
        if outside := [token for token in body.logit_bias if int(token) >= vocabulary]:
            raise ApiError(400, f"logit_bias: token {outside[0]}; the vocabulary is 0 to {vocabulary - 1}", "logit_bias")
        name = _session_of(body, request)
        if name is not None and body.n > 1:
            raise ApiError(400, f"n: {body.n}; want 1 in a session, which continues from its answer", "n")
        started, begun = time.time_ns(), list[Choice]()
        with ExitStack() as cleanup:
            kept = self.sessions.acquire(owner_of(request), name)
            cleanup.callback(self.sessions.release, kept)
            if self.traces is not None:
                cleanup.push(partial(self.traces.record, started, request, body, kept, begun))
            kept.left, kept.sleeps, kept.asleep = request.state.left, 0, 0.0
            with _refusals("prompt" if messages is None else "messages"):
                asked = prompts(kept)
            choices = self._choices(kept, asked, body, max_tokens, messages, schema, begun)
            cleanup.callback(choices.close)
            first = next(choices)
            answer: Response
            if body.stream:
                end = cleanup.pop_all().close
                events = response.events(chain([first], choices), end)
                answer = EventStream(events, end, lambda: self.over or self.sessions.waiting > 0)
            else:
                answer = JSONResponse(response.whole(chain([first], choices)))
            self.metrics.requests.labels(_route(request), 200).inc()
            return answer

    def _choices(
        self,
        kept: KeptSession,
        prompts: list[Prompt],
        body: CompletionRequest | ChatRequest,
        max_tokens: int,
        messages: Messages | None,
        schema: JsonSchema | None,
        begun: list[Choice],
    ) -> Generator[Choice, None, None]:
        """Yield `n` answers to each prompt, closing each before the next one, and append them to `begun`.

        Raises ApiError, for most reasons before the first.
        """
        field = "prompt" if messages is None else "messages"
        room = [self._room(kept, prompt, max_tokens, field) for prompt in prompts]
        for at, (prompt, most) in enumerate(zip(prompts, room, strict=True)):
            for number in range(body.n):
                with ExitStack() as cleanup:
                    cleanup.callback(_forget_unread, kept)
                    with _refusals(field):
                        constraint = None if schema is None else schema.answer()
                        answer = Answer(kept, prompt, number, body, most, self.tokenizer, self.metrics, constraint)
                    cleanup.callback(answer.close)
                    if messages is not None:
                        cleanup.callback(_remember, kept, messages, answer)
                    begun.append(Choice(at * body.n + number, answer, 0 if number else prompt.new))
                    yield begun[-1]

    def _room(self, kept: KeptSession, prompt: Prompt, max_tokens: int, field: str) -> int:
        """Return the maximum number of tokens in the answer to a prompt. Raises ApiError if the prompt itself is too long."""
        vocabulary, context = self.pool.model.config.vocab_size, None if self.pool.model.config.window else self.pool.context
        if max(prompt.ids, default=0) >= vocabulary:
            raise ApiError(400, f"{field}: token {max(prompt.ids)}; the vocabulary is 0 to {vocabulary - 1}", field)
        if max_tokens and not prompt.ids:
            raise ApiError(400, f"{field}: empty; want at least one token", field)
        new = len(prompt.ids) - common_length(kept.tokens, prompt.ids)
        limit = self.limits.prompt if context is None else min(self.limits.prompt, context - len(prompt.ids) + new - 1)
        if new > limit:
            raise ApiError(400, f"{field}: {new} tokens are more than {limit}", field, "context_length_exceeded")
        return max_tokens if context is None else min(max_tokens, context - len(prompt.ids))

    def _check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(404, f"model: '{name}' does not exist; this server has '{self.name}'", "model", "model_not_found")


@contextmanager
def _refusals(field: str) -> Iterator[None]:
    """Turn what is wrong with a prompt into the ApiError that names its field."""
    try:
        yield
    except PoolClosedError:
        raise
    except WindowFullError as error:
        raise ApiError(400, f"{field}{str(error).removeprefix('ids')}", field, "window_full") from None
    except ZooError as error:
        raise ApiError(409 if isinstance(error, BusyError) else 400, str(error)) from None


def _remember(kept: KeptSession, messages: Messages, answer: Answer) -> None:
    kept.messages = [*messages, {"role": "assistant", "content": answer.text}]


def _forget_unread(kept: KeptSession) -> None:
    with suppress(ZooError):  # the pool is closed
        kept.settle()


def _session_of(body: CompletionRequest | ChatRequest, request: Request) -> str | None:
    """Return the session id in the body or in a header. Raises ApiError if two differ."""
    given: dict[str, list[str | None]] = {"session": [body.session]}
    given |= {header: list(request.headers.getlist(header)) for header in SESSION_HEADERS}
    names = {name: field for field, values in given.items() for name in values if name}
    for name, field in names.items():
        if not re.fullmatch(NAME, name):
            raise ApiError(400, f"{field}: {name!r}; want {NAMES}", "session")
    if len(names) > 1:
        both = " and ".join(f"{field}: '{name}'" for name, field in names.items())
        raise ApiError(400, f"session: {both}; the body and the headers must agree", "session")
    return next(iter(names), None)


def _dtype(model: SleepingModel) -> str:
    """Return the dtype of the window caches, which is that of the model; fast weights are always float32."""
    return next((str(leaf.dtype).removeprefix("torch.") for leaf in tree_leaves(model.init_state().window)), "float32")


def _wants_usage(body: CompletionRequest | ChatRequest) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _route(request: Request) -> str:
    route = request.scope.get("route")
    return getattr(route, "path", "other")
