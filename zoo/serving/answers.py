"""From a request to its answer: generated tokens as text, stop strings, JSON bodies and server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import anyio.to_thread
import torch
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from zoo.serving.metrics import Metrics
from zoo.serving.schemas import ApiError, GenerationRequest
from zoo.sessions.session import Session
from zoo.text.tokenizers import ByteTokenizer


class Answer:
    """The text generated for one request, in pieces, cut where a stop string begins.

    Creating it reads the prompt and samples the first token. Raises ZooError.
    """

    def __init__(
        self, session: Session, ids: list[int], request: GenerationRequest, max_tokens: int, tokenizer: ByteTokenizer, metrics: Metrics
    ) -> None:
        self.finish_reason = "length"
        self.text: str | None = None
        """The whole text, once it is complete."""
        self._prompt_tokens, self._tokens = len(ids), 0
        self._tokenizer, self._metrics = tokenizer, metrics
        self._decoder = tokenizer.decoder(ids)
        self._stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
        started = time.perf_counter()
        self._generated = session.generate(
            torch.tensor([ids], dtype=torch.int64, device=session.device) if ids else None,
            max_tokens,
            stop=tokenizer.stop,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            repetition_penalty=request.repetition_penalty,
            seed=request.seed,
        )
        self._first = int(next(self._generated))
        self._time = time.perf_counter()
        metrics.first_token.observe(self._time - started)
        metrics.tokens.labels("prompt").inc(len(ids))

    def close(self) -> None:
        """End the generation."""
        self._generated.close()  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[str]:
        text, sent = "", 0
        for piece in self._decoded():
            text += piece
            ends = [at for stop in self._stops if (at := text.find(stop, max(0, sent - len(stop)))) >= 0]
            if ends:
                self.finish_reason, text = "stop", text[: min(ends)]
                break
            # the last characters may turn out to begin a stop string
            certain = len(text) - max((len(stop) - 1 for stop in self._stops), default=0)
            if certain > sent:
                yield text[sent:certain]
                sent = certain
        if text[sent:]:
            yield text[sent:]
        self.text = text

    def _decoded(self) -> Iterator[str]:
        """Yield the text of each token; stop at the tokenizer's end tokens."""
        token = self._first
        while True:
            self._tokens += 1
            self._metrics.tokens.labels("completion").inc()
            if token in self._tokenizer.stop:
                self.finish_reason = "stop"
                break
            yield self._decoder(token)
            following = next(self._generated, None)
            if following is None:
                break
            token, now = int(following), time.perf_counter()
            self._metrics.next_token.observe(now - self._time)
            self._time = now
        yield self._decoder.flush()

    def usage(self) -> dict[str, int]:
        total = self._prompt_tokens + self._tokens
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": self._tokens, "total_tokens": total}


class CompletionBody:
    """The response to a completion request: one JSON body, or server-sent events."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str) -> None:
        self._model, self._id, self._created = model, f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def chunk_choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Generate to the end and return the JSON body."""
        choice = self.choice("".join(answer))
        return {**self._body(self.object, choice, answer.finish_reason), "usage": answer.usage()}

    def events(self, answer: Answer, end: Callable[[], None]) -> Iterator[str]:
        """Yield a server-sent event for each piece of text; call `end` before the last one, after which the next request may come."""
        try:
            for piece in answer:
                yield f"data: {json.dumps(self._body(self.chunk_object, self.chunk_choice(piece), None))}\n\n"
            end()
            last = self._body(self.chunk_object, self.chunk_choice(""), answer.finish_reason)
            yield f"data: {json.dumps({**last, 'usage': answer.usage()})}\n\n"
        except Exception as error:  # the status has been sent
            yield f"data: {json.dumps(ApiError(500, str(error)).body)}\n\n"
        yield "data: [DONE]\n\n"

    def _body(self, kind: str, choice: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choices = [{"index": 0, "finish_reason": finish_reason, "logprobs": None, **choice}]
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


class ChatBody(CompletionBody):
    """The response to a chat request."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def chunk_choice(self, text: str) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": text}}


class EventStream(StreamingResponse):
    """Server-sent events. `end` is called once they are sent or the client has disconnected."""

    def __init__(self, events: Iterator[str], end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._end)
