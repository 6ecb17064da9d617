"""Streams of tokens that sleep: feed, generate, sleep, fork, save, load."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from zoo.config import validate
from zoo.errors import ZooError, counted
from zoo.files import as_path
from zoo.inputs import StateForm, check_count, check_flag, check_range
from zoo.model import Model
from zoo.schedule import Schedule, new_schedule
from zoo.sessions.file import read_file, write_file
from zoo.sessions.host import Alone, Call, Host, Stream, WindowFullError
from zoo.sessions.sampling import Constraint, LogitsProcessor, Sampler, Sampling
from zoo.sessions.sleeping import Sleep
from zoo.sessions.sleeping_model import SleepingModel, check_model, compiled_model, sleeping_model
from zoo.sessions.snapshot import Snapshot, opening, size
from zoo.state import State


@dataclass(frozen=True)
class Stats:
    """Statistics of a session: tokens and sleeps per stream, bytes of all streams together."""

    tokens: int
    window: int
    """Tokens in the current window, which the next sleep consolidates."""
    evicted: int
    sleeps: int
    seconds_awake: float
    seconds_asleep: float
    state_bytes: int
    """Fast weights; independent of the stream's length."""
    cache_bytes: int
    """Filled part of the window cache."""
    hidden_bytes: int
    """Hidden states of the window, from which a sleep continues if its first pass is the wake pass."""


class Session:
    """`batch_size` streams that advance together. Not thread-safe: one call at a time, and a generation is one call until it has
    ended or is closed. Sleeps may run in another thread.

    Keeps the waking state, which predicts the next token, and the state at the window's start with the window's tokens, which are
    all a sleep needs. If the first pass of a sleep equals the wake pass (`Model.wakes_as_it_sleeps`), the hidden states are kept
    too, and a sleep runs one pass fewer.

    Args:
        model: a `zoo.Model`, or the model of a bundle, as `zoo.export.load` opens it.
        when: a schedule such as "full", "interval(512)", "idle(0.5)", "manual"; see `zoo.schedule`.
        compile: on a CPU, compile the blocks for a token of each stream, in the background, and use them as soon as they are ready.
            Needs a C++ compiler.
        host: runs the session; default: the calling thread. `SessionPool.open` passes the pool.
    Raises:
        ZooError: an unknown schedule, or one that does not fit the model; a model that cannot be compiled. If a background sleep
            fails, the next call raises its error; the stream is as it was before that sleep.
    """

    def __init__(
        self,
        model: Model | SleepingModel,
        batch_size: int = 1,
        *,
        when: str | Schedule = "full",
        compile: bool = False,
        host: Host | None = None,
    ) -> None:
        check_model(model)
        check_count("batch_size", batch_size)
        check_flag("compile", compile)
        self.model, self._compile = model, compile
        self.schedule = new_schedule(when)
        self._limit = self.schedule.due(model.config.window)
        self._model = compiled_model(model) if compile else sleeping_model(model)
        first = opening(self._model, batch_size)
        self._form = StateForm.of(first.state)
        self._stream = Stream(self._model, first)
        self._host = Alone() if host is None else host.open(self._stream)

    @property
    def device(self) -> torch.device:
        """Device of ids and logits."""
        return self._snapshot.ids.device

    @property
    def state(self) -> State:
        """The waking state."""
        return self._current().state

    def feed(self, ids: Tensor) -> Tensor:
        """Read ids: [B, T] int64, T at least 1. Sleeps before any token that must wait for a sleep under the schedule.

        Returns logits [B, T, V]; those at t predict token t + 1.

        Raises:
            ZooError: ids of another shape or outside the vocabulary; under `manual`, more than the window has room for.
        """
        self._check(ids, least=1)
        pending, logits = self._snapshot.pending.shape[1], list[Tensor]()
        self._host.run(self._stream, self._read(ids, logits))
        return torch.cat(logits, dim=1)[:, pending:]

    def read(self, ids: Tensor) -> None:
        """Read ids: [B, T] as `feed` does, without returning logits. T may be 0: only the pending token is read."""
        self._check(ids)
        self._host.run(self._stream, self._read(ids))

    def sleep(self, loops: int | None = None, *, wait: bool = True) -> None:
        """Consolidate the window's tokens and evict them. Does nothing if there are none.

        The last token of a generation is pending: it has not been read, and is not slept on. `read` with no tokens reads it.

        Args:
            loops: passes of the span; default: as in the model's config.
            wait: if False, sleep in the background. The session continues from its waking state; the first call after the sleep
                has ended commits its result, as if the sleep had been instantaneous.
        """
        if loops is not None:
            self._model.check_loops(loops)
        check_flag("wait", wait)
        self._host.run(self._stream, self._consolidate(loops, wait))

    def generate(
        self,
        prompt: Tensor | None,
        tokens: int,
        *,
        stop: Sequence[int] = (),
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        logits_processor: LogitsProcessor | None = None,
        constraint: Constraint | None = None,
        seed: int | None = None,
        seen: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Read prompt: [B, T] and continue it: yields each token, [B] int64, as soon as it is known.

        Tokens that were yielded are part of the stream. The last one is pending: the next call reads it first.
        Until the generation has ended or the iterator has been closed, every other call raises BusyError.

        Args:
            prompt: the tokens to read first; None: continue the stream.
            tokens: maximum number of tokens to generate.
            stop: stop tokens. Ends when every stream has generated one of them; until then, a stream that has repeats it.
            temperature: 0 for the most likely token.
            top_k, top_p: sample from the k most likely tokens; from the smallest set with total probability p.
            min_p: sample from the tokens that are at least p times as likely as the most likely one.
            repetition_penalty: above 1, tokens of the prompt and of the answer become less likely (arXiv 1909.05858).
            presence_penalty, frequency_penalty: subtracted from the logits of tokens in the answer, once and for each occurrence.
            logit_bias: added to the logits of these tokens; -inf excludes one.
            logits_processor: called with the logits [B, V] for each token, float32; returns those to use instead.
            constraint: decides which tokens may come next and when the answer is complete, such as `JsonSchema.answer()` of
                `zoo.text.json_schema`. For one stream only.
            seed: makes the tokens reproducible.
            seen: earlier tokens to which the repetition penalty applies too, [B, T].
        Raises:
            ZooError: a bad argument, at once and before anything is read; a token later, if the processor does not return logits
                [B, V], or every token is excluded.
        """
        how = {"stop": stop, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
        how |= {"repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty}
        how |= {"logit_bias": logit_bias or {}, "logits_processor": logits_processor, "constraint": constraint}
        sampling = validate(Sampling, {"tokens": tokens, **how}, "generate")
        started = self._snapshot.logits is not None
        if prompt is None:
            if not started:
                why = "the last call was interrupted" if self._snapshot.counts.tokens else "nothing has been read yet"
                raise ZooError(f"prompt: None; {why}, so there is nothing to continue")
            prompt = self._snapshot.ids[:, :0]
        self._check(prompt, least=0 if started else 1)
        if seen is not None:
            self._check(seen, name="seen")
        sampler = Sampler(sampling, prompt if seen is None else torch.cat([seen, prompt], dim=1), self.model.config.vocab_size)
        return self._host.run_each(self._stream, self._next_tokens(prompt, sampler))

    def fork(self) -> Session:
        """A second session in the same state, with the same model and host; independent from now on.

        A background sleep that has not ended, or waits for an idle time, belongs to the first session alone: the second one is as
        before it. The same holds for what `save` writes and `snapshot` returns.
        """
        snapshot = self._current()
        twin = Session(self.model, snapshot.ids.shape[0], when=self.schedule, compile=self._compile, host=self._host)
        twin._stream.snapshot = snapshot  # snapshots are immutable
        return twin

    def save(self, path: str | Path) -> None:
        """Write the streams to the file `path` atomically, replacing an existing file. Raises ZooError."""
        write_file(as_path(path), self._model, self._current())

    def load(self, path: str | Path) -> Self:
        """Replace the streams with those that `save` wrote.

        Raises:
            ZooError: the file is damaged, or of another model, or has several streams for a session of a pool; the session stays as
                it was.
        """
        return self.restore(read_file(as_path(path), self._model))

    def snapshot(self) -> Snapshot:
        """Return the streams as they are now. Copies nothing, unless tokens are decoded in slots."""
        return self._current()

    def restore(self, snapshot: Snapshot) -> Self:
        """Replace the streams with those of a snapshot of the same model. Raises ZooError: its state has another form, or a pool is
        given several streams.
        """
        if not isinstance(snapshot, Snapshot):
            raise ZooError(f"snapshot: {type(snapshot).__name__}; want a Snapshot, as `snapshot` returns it")
        streams = len(snapshot.ids)
        if streams > 1 and self._host.single:
            raise ZooError(f"session: {streams} streams; a session of a pool has one")
        caches = [x.dtype for x in tree_leaves(snapshot.state.window) if isinstance(x, Tensor)]  # mixed precision changes it
        self._form.check(snapshot.state, streams, lambda: caches[0])
        self._host.run(self._stream, self._replace(snapshot if self._host.keeps_hidden else snapshot._replace(hidden=None)))
        return self

    def stats(self) -> Stats:
        """Statistics of the streams, and the memory that they take."""
        snapshot = self._current()
        counts = snapshot.counts
        return Stats(
            tokens=counts.tokens,
            window=snapshot.ids.shape[1],
            evicted=counts.tokens - counts.cached,
            sleeps=counts.sleeps,
            seconds_awake=counts.awake,
            seconds_asleep=counts.asleep,
            state_bytes=size(snapshot.state.fast),
            cache_bytes=size(snapshot.state.window),
            hidden_bytes=size(snapshot.hidden),
        )

    def close(self) -> None:
        """Cancel background sleeps. A session of a pool makes room for another one; any other is closed when it is collected."""
        self._host.close(self._stream)

    @property
    def _snapshot(self) -> Snapshot:
        """The streams at the end of the last call; the waking state may be in slots."""
        return self._stream.snapshot

    @property
    def _window_length(self) -> int:
        return self._snapshot.ids.shape[1]

    def _current(self) -> Snapshot:
        """The streams now, with a finished sleep committed and the waking state out of the slots."""

        async def current() -> Snapshot:
            await self._stream.collect_finished_sleep()
            self._host.reclaim(self._stream)
            return self._snapshot

        return self._host.run(self._stream, current())

    async def _replace(self, snapshot: Snapshot) -> None:
        self._stream.cancel_sleep()
        self._stream.snapshot = snapshot

    def _next_tokens(self, prompt: Tensor, sampler: Sampler) -> Iterator[Call[Tensor]]:
        for _ in range(sampler.sampling.tokens):
            yield self._next_token(prompt, sampler)
            if sampler.over:
                return
            prompt = prompt[:, :0]

    async def _next_token(self, prompt: Tensor, sampler: Sampler) -> Tensor:
        """Read prompt and choose the next token."""
        await self._read(prompt)
        assert self._snapshot.logits is not None
        token = sampler(self._snapshot.logits)
        self._stream.advance(self._snapshot._replace(pending=token[:, None]))
        return token.clone()  # the caller's own

    async def _read(self, ids: Tensor, logits: list[Tensor] | None = None) -> None:
        """Read the pending token, then ids, in pieces with sleeps between them.

        Appends the logits of each piece to `logits`; without it, only those of the last token are computed.
        """
        await self._cancel_idle_sleep()
        ids = torch.cat([self._snapshot.pending, ids], dim=1)
        await self._check_room(ids.shape[1])
        while ids.shape[1]:
            room = (await self._room()) or ids.shape[1]
            started, piece, before = time.perf_counter(), ids[:, :room], self._snapshot.counts.tokens
            keep = piece.shape[1] if logits is not None else int(piece.shape[1] == ids.shape[1])
            out, snapshot = await self._host.wake(self._stream, piece, keep)
            counts = snapshot.counts._replace(awake=snapshot.counts.awake + time.perf_counter() - started)
            self._stream.advance(snapshot._replace(pending=snapshot.pending[:, :0], counts=counts))
            ids = ids[:, counts.tokens - before :]
            if logits is not None:
                logits.append(out)
        if self.schedule.pause is not None and self._stream.sleep is None and self._window_length:
            self._begin(self._new_sleep(pause=self.schedule.pause))

    async def _consolidate(self, loops: int | None, wait: bool) -> None:
        await self._cancel_idle_sleep()
        await self._wait_for_sleep()
        if self._window_length:
            self._begin(self._new_sleep(loops), wait=wait)
            if wait:
                await self._wait_for_sleep()

    def _new_sleep(self, loops: int | None = None, pause: float | None = None) -> Sleep:
        usual = self._window_length == self._limit and loops in (None, self.model.config.loops)
        return Sleep(self._model, self._snapshot, loops, pause=pause, usual=usual)

    def _begin(self, sleep: Sleep, *, wait: bool = False) -> None:
        self._stream.sleep = sleep
        self._host.begin(self._stream, sleep, wait=wait)

    async def _cancel_idle_sleep(self) -> None:
        """A caller is waiting: cancel a sleep that only used idle time. One that has ended is committed."""
        await self._stream.collect_finished_sleep()
        if self._stream.sleep is not None and self._stream.sleep.pause is not None:
            self._stream.cancel_sleep()

    async def _wait_for_sleep(self) -> None:
        """Wait for the sleep in progress, if any, and commit it."""
        if self._stream.sleep is not None:
            await self._host.wait(self._stream.sleep)
            await self._stream.collect_finished_sleep()

    async def _room(self) -> int | None:
        """Number of tokens that can be read before the next sleep, at least 1; None: any number. Sleeps if there is no room."""
        window = self.model.config.window
        if window is None:
            return None
        # during a background sleep, the stream reads on until its window is full
        while self._window_length >= (limit := window if self._stream.sleep is not None else self._limit or window):
            if self._stream.sleep is not None:
                await self._wait_for_sleep()
            else:
                await self._consolidate(None, wait=self._window_length >= window or not self._host.reads_while_asleep)
        return limit - self._window_length

    async def _check_room(self, tokens: int) -> None:
        """Refuse more tokens than can be read. Raises ZooError."""
        window, context, read = self.model.config.window, self._host.context, self._snapshot.counts.tokens
        if window is None:
            if context is not None and read + tokens > context:
                raise ZooError(f"ids: {counted(tokens, 'token')} after {read}; the pool holds a context of {context}")
            return
        if self._limit is not None:
            return
        if tokens > window - self._window_length:
            await self._wait_for_sleep()
        if tokens > (room := window - self._window_length):
            after = "it never has room for so long a piece" if tokens > window else "sleep first"
            raise WindowFullError(
                f"ids: {counted(tokens, 'token')}; the window of {window} has room for {room}, and the schedule is manual: {after}"
            )

    def _check(self, ids: Tensor, least: int = 0, name: str = "ids") -> None:
        """Refuse ids that are not [B, T] int64 with T at least `least`, or outside the vocabulary. Raises ZooError."""
        batch, vocabulary = self._snapshot.ids.shape[0], self.model.config.vocab_size
        if not isinstance(ids, Tensor):
            raise ZooError(f"{name}: {type(ids).__name__}; want a tensor, [{batch}, T] torch.int64")
        if ids.ndim != 2 or ids.shape[0] != batch or ids.shape[1] < least or ids.dtype != torch.int64:
            raise ZooError(f"{name}: {list(ids.shape)} {ids.dtype}; want [{batch}, T] torch.int64{' with T at least 1' if least else ''}")
        if ids.device != self.device:
            raise ZooError(f"{name}: on {ids.device}; the session is on {self.device}")
        if ids.numel():
            check_range(ids, vocabulary, name)
