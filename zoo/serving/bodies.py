"""Responses in OpenAI's form: one JSON body, or server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from zoo.serving.answers import Answer, Logprob
from zoo.serving.errors import as_api_error

SILENCE = 1.0  # seconds that a client may read nothing while another request waits for its stream


class Choice(NamedTuple):
    """An answer and its place in the response."""

    number: int
    answer: Answer
    prompt_tokens: int
    """Number of tokens in the prompt; 0 for a further answer to the same prompt."""


class CompletionBody:
    """The response to a completion request.

    Args:
        top: number of most likely tokens in log-probabilities; None: none are returned.
        usage: True if a stream ends with the usage.
    """

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, top: int | None, usage: bool) -> None:
        self._top, self._usage = top, usage
        self._fields = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def text(self, text: str) -> dict[str, Any]:
        """Return the fields of a whole choice."""
        return {"text": text}

    def delta(self, text: str | None, *, first: bool = False) -> dict[str, Any]:
        """Return the fields of a choice in an event; text None: the last one."""
        return {"text": text or ""}

    def opening(self) -> str | None:
        """Return the text of an event before the first piece; None: there is no such event."""
        return None

    def logprobs(self, entries: list[Logprob]) -> dict[str, Any]:
        return {
            "tokens": [shown(entry.token, "bytes:") for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [
                None if entry.logprob is None else {shown(token, "bytes:"): value for token, value in reversed(entry.top)}
                for entry in entries
            ],
            "text_offset": [entry.offset for entry in entries],
        }

    def whole(self, choices: Iterable[Choice]) -> dict[str, Any]:
        """Generate to the end and return the JSON body."""
        usage, bodies = _Usage(), []
        for choice in choices:
            pieces = list(choice.answer)
            fields = self.text("".join(piece.text for piece in pieces))
            entries = [entry for piece in pieces for entry in piece.logprobs]
            bodies.append(self._choice(choice.number, fields, entries, choice.answer.finish_reason))
            usage.add(choice)
        return {**self._fields, "object": self.object, "choices": bodies, "usage": usage.body()}

    def events(self, choices: Iterable[Choice], end: Callable[[], None]) -> Iterator[str]:
        """Yield a server-sent event for each piece of text; call `end` before the last ones, after which the next request may come."""
        usage, last = _Usage(), None
        try:
            for choice in choices:
                if last is not None:
                    yield last
                if (opening := self.opening()) is not None:
                    yield self._event([self._choice(choice.number, self.delta(opening, first=True), [], None)])
                for piece in choice.answer:
                    yield self._event([self._choice(choice.number, self.delta(piece.text), piece.logprobs, None)])
                last = self._event([self._choice(choice.number, self.delta(None), [], choice.answer.finish_reason)])
                usage.add(choice)
            end()
            assert last is not None
            yield last
            if self._usage:
                yield self._event([], usage.body())
        except Exception as error:  # the status has been sent
            yield f"data: {json.dumps(as_api_error(error).body)}\n\n"
        yield "data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        more = {"usage": usage} if self._usage else {}
        return f"data: {json.dumps({**self._fields, 'object': self.chunk_object, 'choices': choices, **more})}\n\n"

    def _choice(self, index: int, fields: dict[str, Any], entries: list[Logprob], finish_reason: str | None) -> dict[str, Any]:
        logprobs = None if self._top is None else self.logprobs(entries)
        return {"index": index, **fields, "logprobs": logprobs, "finish_reason": finish_reason}


def shown(token: bytes, prefix: str = "") -> str:
    r"""Return the text of a token; if it is not whole characters, a prefix and its bytes as \xNN, as OpenAI's API writes them."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in token)


class ChatBody(CompletionBody):
    """The response to a chat request."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str | None, *, first: bool = False) -> dict[str, Any]:
        return {"delta": {**({"role": "assistant"} if first else {}), **({} if text is None else {"content": text})}}

    def opening(self) -> str | None:
        return ""

    def logprobs(self, entries: list[Logprob]) -> dict[str, Any]:
        def entry(token: bytes, logprob: float) -> dict[str, Any]:
            return {"token": shown(token), "logprob": logprob, "bytes": list(token)}

        content = [
            {**entry(each.token, each.logprob), "top_logprobs": [entry(*other) for other in each.top]}
            for each in entries
            if each.logprob is not None
        ]
        return {"content": content, "refusal": None}


class _Usage:
    """Tokens of all choices of a response."""

    def __init__(self) -> None:
        self.prompt = self.completion = self.cached = 0

    def add(self, choice: Choice) -> None:
        self.prompt += choice.prompt_tokens
        self.cached += choice.answer.cached if choice.prompt_tokens else 0
        self.completion += len(choice.answer.tokens)

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class EventStream(StreamingResponse):
    """Server-sent events.

    Args:
        end: called once they are sent, or the client has disconnected or reads nothing.
        needed: returns True if another request waits for the stream, or the server shuts down; a client may then pause for `SILENCE`.
    """

    def __init__(self, events: Iterator[str], end: Callable[[], None], needed: Callable[[], bool]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._end, self._needed = end, needed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def in_time(message: Message) -> None:
            started = time.monotonic()
            while time.monotonic() - started < SILENCE or not self._needed():
                with anyio.move_on_after(0.1):  # until the client reads, uvicorn has written nothing
                    await send(message)
                    return
            raise TimeoutError

        try:
            with suppress(TimeoutError):
                await super().__call__(scope, receive, in_time)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._end)
