"""Answers to prompts: generated tokens as text, with stop strings and log-probabilities."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.serving.kept import Ends, KeptSession
from zoo.serving.metrics import Metrics
from zoo.serving.schemas import ChatRequest, CompletionRequest
from zoo.sessions.host import WindowFullError
from zoo.sessions.sampling import Constraint
from zoo.text.tokenizers import ByteTokenizer


class Prompt(NamedTuple):
    """Prompt as tokens."""

    ids: list[int]
    """All tokens that the stream must hold."""
    new: int
    """Number of these, counted from the end, that come from the request."""
    ends: Ends = tuple
    """Positions after which the state is worth keeping."""


class Logprob(NamedTuple):
    """Log-probability of a token and of the most likely ones in its place; None for the first token of a stream."""

    token: bytes
    logprob: float | None
    top: list[tuple[bytes, float]]
    offset: int
    """Offset of its text in the answer."""


class Piece(NamedTuple):
    """Part of an answer."""

    text: str
    logprobs: list[Logprob]


class Answer:
    """The answer to one prompt, in pieces, cut where a stop string begins.

    Creating it reads the prompt and samples the first token. Raises ZooError; ApiError if the client has left, also later.

    Args:
        number: index among the answers to the same prompt, which is added to the seed.
        constraint: decides which tokens the answer may consist of.
    """

    def __init__(
        self,
        kept: KeptSession,
        prompt: Prompt,
        number: int,
        request: CompletionRequest | ChatRequest,
        max_tokens: int,
        tokenizer: ByteTokenizer,
        metrics: Metrics,
        constraint: Constraint | None = None,
    ) -> None:
        self.finish_reason, self.ended = "length", False
        self.text = ""
        """Text that was sent."""
        self.cached, self.tokens = 0, list[int]()
        """Number of prompt tokens that were not read again, and the generated tokens."""
        self._kept, self._tokenizer, self._metrics, self._constraint = kept, tokenizer, metrics, constraint
        self._stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
        self._top = request.top
        self._logits: deque[Tensor] = deque()
        self._echo: Piece | None = None
        self._generated: Any = (token for token in list[Tensor]())
        started = time.perf_counter()
        new = prompt.ids[len(prompt.ids) - prompt.new :]
        if request.echo and self._top is not None:
            self._echo = self._scored(new)
        else:
            self.cached = max(0, kept.read(prompt.ids, prompt.ends) - len(prompt.ids) + prompt.new)
            self._echo = Piece(tokenizer.decode(new), []) if request.echo else None
        metrics.tokens.labels("prompt").inc(prompt.new - self.cached)
        metrics.tokens.labels("cached").inc(self.cached)
        if max_tokens:
            self._generated = kept.session.generate(
                None,
                max_tokens,
                stop=tokenizer.stop,
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=request.top_k,
                min_p=request.min_p,
                repetition_penalty=request.repetition_penalty,
                presence_penalty=request.presence_penalty,
                frequency_penalty=request.frequency_penalty,
                logit_bias={int(token): bias for token, bias in request.logit_bias.items()},
                logits_processor=None if self._top is None else self._record,
                constraint=constraint,
                seed=None if request.seed is None else (request.seed + number) % 2**63,
                seen=None if request.repetition_penalty == 1 else torch.tensor([prompt.ids], device=kept.session.device),
            )
            self.tokens.append(int(next(self._generated)))
        self._decode = tokenizer.decoder(prompt.ids)
        self.first_token = time.time_ns()
        """When the first token was ready, in nanoseconds since 1970."""
        self._time = time.perf_counter()
        metrics.first_token.observe(self._time - started)

    def close(self) -> None:
        """End the generation: the stream holds the tokens that have been taken."""
        self._generated.close()
        self._kept.tokens = [*self._kept.tokens, *self.tokens]

    def __iter__(self) -> Iterator[Piece]:
        if self._echo is not None:
            yield self._echo
        base = len(self._echo.text) if self._echo is not None else 0
        text, sent, logprobs = "", 0, list[Logprob]()
        for piece in self._decoded():
            if self._top is not None:
                logprobs += self._logprobs(base + len(text), piece)
            text += piece
            ends = [at for stop in self._stops if (at := text.find(stop, max(0, sent - len(stop)))) >= 0]
            if ends:
                self.finish_reason, text = "stop", text[: min(ends)]
                logprobs = [entry for entry in logprobs if entry.offset < base + len(text)]
                break
            # the last characters may turn out to begin a stop string
            certain = len(text) - max((len(stop) - 1 for stop in self._stops), default=0)
            if certain > sent:
                self.text = text[:certain]
                yield Piece(text[sent:certain], logprobs)
                sent, logprobs = certain, []
        self.text = text
        self.ended = True
        if text[sent:] or logprobs:
            yield Piece(text[sent:], logprobs)

    def _decoded(self) -> Iterator[str]:
        """Yield the text of each token; stop at the tokenizer's end tokens."""
        while self.tokens:
            self._metrics.tokens.labels("completion").inc()
            if self.tokens[-1] in self._tokenizer.stop:
                self.finish_reason = "stop"
                break
            yield self._decode(self.tokens[-1])
            self._kept.check_client()
            try:
                following = next(self._generated, None)
            except WindowFullError:  # the answer ends as at the end of a context
                break
            if following is None:
                if self._constraint is not None and self._constraint.over:
                    self.finish_reason = "stop"
                break
            self.tokens.append(int(following))
            now = time.perf_counter()
            self._metrics.next_token.observe(now - self._time)
            self._time = now
        if rest := self._decode.flush():
            yield rest

    def _record(self, logits: Tensor) -> Tensor:
        self._logits.append(logits[0])
        return logits

    def _logprobs(self, offset: int, text: str) -> list[Logprob]:
        """Return the entry of the last token, whose text is at `offset`."""
        return [self._logprob(self.tokens[-1], self._logits.popleft(), offset)] if self._logits else []

    def _logprob(self, token: int, logits: Tensor | None, offset: int) -> Logprob:
        name = self._tokenizer.bytes_of(token)
        if logits is None or self._top is None:
            return Logprob(name, None, [], offset)
        logprobs = logits.float().log_softmax(-1)
        best = logprobs.topk(min(self._top, len(logprobs)))
        top = [(self._tokenizer.bytes_of(other), value) for value, other in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        return Logprob(name, float(logprobs[token]), top, offset)

    def _scored(self, ids: list[int]) -> Piece:
        """Read `ids`. Returns their text, with the log-probability of each."""
        text, entries, decode = "", list[Logprob](), self._tokenizer.decoder()
        for token, logits in self._kept.score(ids):
            entries.append(self._logprob(token, logits, len(text)))
            text += decode(token)
        return Piece(text + decode.flush(), entries)
