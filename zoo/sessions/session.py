"""Streams of tokens that sleep: feed, generate, sleep, fork, save, load."""

from __future__ import annotations

import time
import weakref
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from zoo.config import validate
from zoo.errors import ZooError
from zoo.model import Model
from zoo.schedule import Schedule, new_schedule
from zoo.sessions.file import read_file, write_file
from zoo.sessions.sampling import Sampler, Sampling
from zoo.sessions.sleeping import Nap, Worker
from zoo.sessions.slots import Slots
from zoo.sessions.snapshot import Moment, Sleeper, after_reading, finish, one_of, opening, read, size, together
from zoo.state import State

T = TypeVar("T")


@dataclass(frozen=True)
class Stats:
    """What a session has done. Tokens and sleeps are those of each of its streams, bytes those of all."""

    tokens: int
    window: int
    """Tokens of the present window, which the next sleep is about."""
    evicted: int
    sleeps: int
    seconds_awake: float
    seconds_asleep: float
    state_bytes: int
    """Fast weights, whatever the stream's length."""
    cache_bytes: int
    """Window cache, as full as it is."""
    hidden_bytes: int
    """Hidden states of the window, from which a sleep goes on where its first pass is the wake pass."""


class Session:
    """`batch_size` streams that advance together. One thread at a time may use it; sleeps may run in another.

    Keeps the state at the window's start and the window's tokens, which is all that a sleep needs, beside the waking
    state that answers meanwhile. Where the first pass asleep is the wake pass (`Model.wakes_as_it_sleeps`), it keeps the
    hidden states too, and a sleep runs one pass less.

    Args:
        model: a `zoo.Model`, or what `zoo.export.load` has.
        when: a schedule such as "full", "interval(512)", "idle(0.5)", "manual"; see `zoo.schedule`.
    Raises:
        ZooError: an unknown schedule, or one that does not fit the model. The next call after a sleep in the background
            has failed raises what it failed with; the stream is as it was before that sleep.
    """

    _goes_on = False
    """Whether a sleep that is due before the window is full runs in the background."""

    def __init__(self, model: Sleeper, batch_size: int = 1, *, when: str | Schedule = "full") -> None:
        if batch_size < 1:
            raise ZooError(f"batch_size: {batch_size} must be at least 1")
        self.model = model
        self.schedule = new_schedule(when) if isinstance(when, str) else when
        self._due = self.schedule.due(model.config.window)
        self._moment = opening(model, batch_size)
        self._slots: Slots[int] | None = None
        """Holds the waking state while tokens are read one by one, if the model has decode steps of fixed shapes."""
        self._nap: Nap | None = None
        self._worker: Worker | None = None

    @property
    def state(self) -> State:
        """The waking state."""
        return self._look().state

    def feed(self, ids: Tensor) -> Tensor:
        """Read ids: [B, T] int64, any T at least 1. Sleeps when the schedule says so and a further token comes.

        Returns logits [B, T, V]: after each token, those of the next.

        Raises:
            ZooError: ids of another shape or outside the vocabulary; under `manual`, more than the window has room for.
        """
        self._check(ids, least=1)
        said, logits = self._moment.said.shape[1], list[Tensor]()
        self._run(self._read(ids, logits))
        return torch.cat(logits, dim=1)[:, said:]

    def sleep(self, loops: int | None = None, *, wait: bool = True) -> None:
        """Consolidate the window's tokens and evict them. Does nothing if there are none.

        Args:
            loops: passes of the span, default as the model has.
            wait: False: in the background. The session goes on from the state it has; once the sleep has ended, the
                next call takes it up, as if it had happened at once.
        """
        if loops is not None and loops < 1:
            raise ZooError(f"loops: {loops} must be at least 1")
        self._run(self._sleep(loops, wait))

    def generate(
        self,
        prompt: Tensor | None,
        tokens: int,
        *,
        stop: Sequence[int] = (),
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """Read prompt: [B, T] and continue it: yields each token, [B] int64, as soon as it is known.

        What has been yielded is part of the stream. The last token is read when the stream goes on.

        Args:
            prompt: None: goes on from what has been read.
            tokens: at most so many.
            stop: ends when every stream has said one of these; a stream that has repeats it meanwhile.
            temperature: 0 for the likeliest token.
            top_k, top_p: choose among the so many likeliest tokens; among the likeliest with so much of the probability.
            repetition_penalty: above 1 for fewer tokens of the prompt and of what was generated (arXiv 1909.05858).
            seed: for the same tokens every time.
        Raises:
            ZooError: a bad argument, at once and before anything is read.
        """
        how = {"stop": tuple(stop), "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        sampling = validate(Sampling, {"tokens": tokens, "repetition_penalty": repetition_penalty, **how}, "generate")
        if prompt is None:
            if self._moment.logits is None:
                raise ZooError("prompt: nothing has been read yet, so there is nothing to go on from")
            prompt = self._moment.ids[:, :0]
        self._check(prompt, least=0 if self._moment.logits is not None else 1)
        return self._generate(prompt, sampling)

    def _generate(self, prompt: Tensor, sampling: Sampling) -> Iterator[Tensor]:
        sampler = Sampler(sampling, prompt, self.model.config.vocab_size)
        for _ in range(sampling.tokens):
            yield self._run(self._say(prompt, sampler))
            if sampler.over:
                return
            prompt = prompt[:, :0]

    def fork(self) -> Session:
        """A session that stands where this one does, with the same model. What either reads, the other does not see."""
        moment = self._look()
        twin = Session(self.model, moment.ids.shape[0], when=self.schedule)
        twin._moment = moment  # states are never changed in place
        return twin

    def save(self, path: str | Path) -> None:
        """Write the streams to the file `path`, whole or not at all; a file that is there is replaced. Raises ZooError."""
        write_file(Path(path), self.model, self._look())

    def load(self, path: str | Path) -> Self:
        """Go on with the streams that `save` wrote, in place of these.

        Raises:
            ZooError: the file is damaged, or of another model; the session stays as it was.
        """
        self._replace(read_file(Path(path), self.model))
        return self

    def stats(self) -> Stats:
        """What has happened so far, and what memory the streams take."""
        moment = self._look()
        counts = moment.counts
        return Stats(
            tokens=counts.tokens,
            window=moment.ids.shape[1],
            evicted=counts.tokens - counts.cached,
            sleeps=counts.sleeps,
            seconds_awake=counts.awake,
            seconds_asleep=counts.asleep,
            state_bytes=size(moment.state.fast),
            cache_bytes=size(moment.state.window),
            hidden_bytes=size(moment.hidden),
        )

    def close(self) -> None:
        """Leave off sleeping in the background. A session that is no longer used closes by itself."""
        self._nap = None
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _look(self) -> Moment:
        """The streams as they are now."""
        return self._run(self._present())

    async def _present(self) -> Moment:
        await self._settle()
        self._take()
        return self._moment

    def _take(self) -> None:
        """The moment holds the waking state again, which slots may have had."""
        if self._slots is not None and self._slots.names:
            states = [self._slots.take(n) for n in range(self._moment.ids.shape[0])]
            self._moment = self._moment._replace(state=together(states))

    def _replace(self, moment: Moment) -> None:
        self._take()
        if self._nap is not None:
            self._nap.stop()
        self._nap, self._moment = None, moment

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Drive `work` to its end. Whatever takes long is a generator that a pool can drive bit by bit."""
        with torch.no_grad():
            return finish(work)

    async def _read(self, ids: Tensor, logits: list[Tensor] | None = None) -> None:
        """Read what was said, then ids, piece by piece with sleeps between. The logits of each piece are added to `logits`."""
        await self._interrupt()
        ids = torch.cat([self._moment.said, ids], dim=1)
        await self._make_sure_of_room(ids.shape[1])
        while ids.shape[1]:
            room = (await self._room()) or ids.shape[1]
            started = time.perf_counter()
            out, moment = await self._wake(ids[:, :room])
            counts = moment.counts._replace(awake=moment.counts.awake + time.perf_counter() - started)
            self._moment = moment._replace(said=moment.said[:, :0], counts=counts)
            if self._nap is not None:
                self._nap.latest = self._moment
            ids = ids[:, out.shape[1] :]
            if logits is not None:
                logits.append(out)
        if self.schedule.pause is not None and self._nap is None and self._held:
            self._begin(Nap(self.model, self._moment, yields_to_tokens=True), self.schedule.pause)

    async def _wake(self, ids: Tensor) -> tuple[Tensor, Moment]:
        """One wake pass over ids, or over the first of them."""
        if ids.shape[1] == 1 and _decodes_in_slots(self.model):
            return self._decode(ids)
        self._take()
        return read(self.model, self._moment, ids)

    def _decode(self, ids: Tensor) -> tuple[Tensor, Moment]:
        """One wake pass over a token, in slots."""
        batch, window = ids.shape[0], self.model.config.window
        if self._slots is None:
            assert isinstance(self.model, Model)
            assert window is not None
            self._slots = Slots(self.model, batch, window)
        if not self._slots.names:
            for n in range(batch):
                self._slots.put(n, one_of(self._moment.state, n))
            self._moment = self._moment._replace(state=self._moment.start)
        logits = self._slots.read(range(batch), ids)
        return logits, after_reading(self.model, self._moment, ids, logits, self._moment.state)

    async def _say(self, prompt: Tensor, sampler: Sampler) -> Tensor:
        """Read prompt and choose the next token."""
        await self._read(prompt)
        assert self._moment.logits is not None
        token = sampler(self._moment.logits)
        self._moment = self._moment._replace(said=token[:, None])
        return token

    async def _sleep(self, loops: int | None, wait: bool) -> None:
        await self._interrupt()
        await self._wait()
        if self._held:
            self._begin(Nap(self.model, self._moment, loops), wait=wait)
            if wait:
                await self._wait()

    async def _room(self) -> int | None:
        """How many tokens can be read before the next sleep, at least 1; None: any number. Sleeps if there is no room."""
        window = self.model.config.window
        if window is None:
            return None
        # while a sleep runs, the stream goes on until its window is full
        while self._held >= (limit := window if self._nap is not None else self._due or window):
            if self._nap is not None:
                await self._wait()
            else:
                await self._sleep(None, wait=self._held >= window or not self._goes_on)
        return limit - self._held

    @property
    def _held(self) -> int:
        return self._moment.ids.shape[1]

    async def _make_sure_of_room(self, tokens: int) -> None:
        window = self.model.config.window
        if self._due is not None or window is None:
            return
        if tokens > window - self._held:
            await self._wait()
        if tokens > (room := window - self._held):
            raise ZooError(f"ids: {tokens} tokens; the window of {window} has room for {room}, and the schedule is manual: sleep first")

    def _check(self, ids: Tensor, least: int = 0) -> None:
        batch, vocabulary = self._moment.ids.shape[0], self.model.config.vocab_size
        if ids.ndim != 2 or ids.shape[0] != batch or ids.shape[1] < least or ids.dtype != torch.int64:
            raise ZooError(f"ids: {list(ids.shape)} {ids.dtype}; want [{batch}, T] torch.int64{' with T at least 1' if least else ''}")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ZooError(f"ids: from {int(ids.min())} to {int(ids.max())}; the vocabulary is 0 to {vocabulary - 1}")

    def _begin(self, nap: Nap, after: float = 0.0, *, wait: bool = False) -> None:
        """Run `nap`: in the background in `after` seconds, or here if somebody waits for it."""
        self._nap = nap
        if wait:
            nap.run()
            return
        if self._worker is None:
            self._worker = Worker()
            weakref.finalize(self, self._worker.close)
        self._worker.begin(nap, after)

    async def _settle(self) -> None:
        """Take up a sleep that has ended in the background: its result, or what it failed with."""
        nap = self._nap
        if nap is not None and nap.ended.is_set():
            self._take()
            self._nap = None
            if nap.error is not None:
                raise nap.error
            if nap.after is not None:
                self._moment = await nap.commit()

    async def _interrupt(self) -> None:
        """Somebody waits: leave off a sleep that was only there to use the time."""
        await self._settle()
        if self._nap is not None and self._nap.yields_to_tokens:
            self._nap.stop()
            self._nap = None

    async def _wait(self) -> None:
        """Until the sleep that runs has ended."""
        if self._nap is not None:
            self._nap.ended.wait()
            await self._settle()


def _decodes_in_slots(model: Sleeper) -> bool:
    """Whether steps of fixed shapes are faster: as CUDA graphs. On a CPU they are not, and a cache without a bound has no fixed shape."""
    return isinstance(model, Model) and model.config.window is not None and model.embed.weight.is_cuda
