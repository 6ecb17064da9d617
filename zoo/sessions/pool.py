"""Many streams through one model: tokens of those awake in one batch, sleeps and prompts in the gaps between."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from zoo.costs import window_bytes
from zoo.errors import ZooError
from zoo.model import Model
from zoo.schedule import Schedule, new_schedule
from zoo.sessions import sliced as sweep
from zoo.sessions.sampling import Sampler, Sampling
from zoo.sessions.session import Session
from zoo.sessions.sleeping import Nap
from zoo.sessions.sliced import Turn
from zoo.sessions.slots import Slots, context_of
from zoo.sessions.snapshot import Moment, after_reading, finish, kept, one_of, opening, reading, size, together

T = TypeVar("T")
BIT = 32  # tokens that a block takes at a time while somebody waits for a token
PIECE = 256  # while nobody does; and what is read of a prompt in one pass
SHARE = 0.25  # of the time that a token usually takes: what sleeps that nobody waits for may take after it


class PoolFullError(ZooError):
    """There is no room for another stream."""


class BusyError(ZooError):
    """A stream was asked for something before it had answered the last call."""


class _Work:
    """What a stream has been asked to do: a generator on its way.

    It yields None before each bit, and is sent how many tokens that may take; ids [1, 1] to have that token read, and is
    sent logits [1, 1, V]; or a sleep to wait for.
    """

    def __init__(self, stream: Stream, steps: Coroutine[Any, Any, Any]) -> None:
        self.stream, self.steps = stream, steps
        self.result: Future[Any] = Future()
        self.wants: Any = None
        self.cancelled = False


class SessionPool:
    """A scheduler in a thread of its own, and the streams that it serves.

    Every turn reads one token for each stream that waits for one, in one batch whatever their positions; prompts and
    sleeps advance bit by bit, one block over `BIT` tokens: after a token in `SHARE` of the time that it usually takes, or
    in what is due to those who wait for them; when nobody waits for a token, in all of the time. Sleeps that begin then
    at the same position with as many tokens are run as one batch.

    Args:
        slots: streams that one batch takes; more take turns.
        streams: streams that may be open; `open` refuses one more.
        when: the schedule of every stream. Under `interval(n)` with n below the window, and `idle`, streams go on while
            they sleep.
        context: tokens a stream may have, for a model that never sleeps.
        max_bytes: what `bytes` may be at most.
    Raises:
        ZooError: a bad argument; slots and streams that may need more than `max_bytes`.
    """

    def __init__(
        self,
        model: Model,
        slots: int = 8,
        *,
        streams: int | None = None,
        when: str | Schedule = "full",
        context: int | None = None,
        max_bytes: int | None = None,
    ) -> None:
        streams = slots if streams is None else streams
        if slots < 1 or streams < 1:
            raise ZooError(f"slots: {slots}, streams: {streams}; both must be at least 1")
        self.model, self.streams = model, streams
        self.schedule = new_schedule(when) if isinstance(when, str) else when
        self.schedule.due(model.config.window)
        self.context = context_of(model, context)
        self.bytes = _bytes(model, slots, streams, self.context)
        """Most that the states of `streams` streams take, whatever they do, beside the activations of the pass that runs."""
        if max_bytes is not None and self.bytes > max_bytes:
            raise ZooError(
                f"max_bytes: {max_bytes}; {slots} slots and {streams} streams of {model.config.name} may need {self.bytes}: allow fewer"
            )
        self._open: set[Stream] = set()
        self._slots: Slots[Stream] = Slots(model, slots, self.context)
        self._news = threading.Condition()
        self._arrived: list[_Work] = []
        self._unanswered: set[_Work] = set()
        self._slices: deque[_Work] = deque()
        self._tokens: deque[_Work] = deque()
        self._asleep: list[_Work] = []
        self._naps: list[tuple[float, Nap]] = []
        self._group: tuple[list[Nap], Coroutine[Any, Any, None]] | None = None
        self._usual: dict[int, float] = {}
        """Seconds that tokens of so many streams take."""
        self._credit = self._cost = 0.0
        """Seconds left for bits, and what the dearest of the last ones took."""
        self._prompt_was_last = False
        self.sleeps = 0
        """Sleeps that have ended."""
        self._closed = False
        self._failure: BaseException | None = None
        self.thread = threading.Thread(target=self._serve, name="zoo-pool", daemon=True)
        self.thread.start()

    def open(self) -> Stream:
        """A new stream. Raises PoolFullError."""
        return self.admit(opening(self.model, 1))

    def admit(self, moment: Moment) -> Stream:
        stream = Stream(self, moment)
        with self._news:
            if len(self._open) >= self.streams:
                raise PoolFullError(f"streams: {self.streams} are open, and no more are allowed; close one first")
            self._open.add(stream)
        return stream

    def __len__(self) -> int:
        """Streams that are open."""
        return len(self._open)

    def forget(self, stream: Stream) -> None:
        with self._news:
            self._open.discard(stream)

    def close(self) -> None:
        """Leave off whatever is going on, and end the thread. Who still waits for something gets a ZooError."""
        with self._news:
            self._closed = True
            self._news.notify()
        self.thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def submit(self, work: _Work) -> None:
        with self._news:
            if self._failure is not None:
                raise ZooError(f"pool: it has failed: {self._failure}") from self._failure
            if self._closed:
                raise ZooError("pool: it is closed")
            if work.stream not in self._open:
                raise ZooError("stream: it is closed")
            self._arrived.append(work)
            self._unanswered.add(work)
            self._news.notify()

    def begin(self, nap: Nap, after: float) -> None:
        """Called in the scheduler's thread."""
        self._naps.append((time.monotonic() + after, nap))

    def take(self, stream: Stream) -> None:
        """Called in the scheduler's thread: the stream's moment holds its state again, which a slot has had."""
        if stream in self._slots.names:
            stream._moment = stream._moment._replace(state=self._slots.take(stream))

    def _serve(self) -> None:
        try:
            with torch.no_grad():
                while self._wait_for_work():
                    self._turn()
            error: BaseException = ZooError("pool: it is closed")
        except BaseException as failure:
            self._failure = error = failure
        with self._news:
            self._closed = True
            for work in self._unanswered:
                work.result.set_exception(error)

    def _wait_for_work(self) -> bool:
        with self._news:
            while not self._closed:
                self._naps = [(due, nap) for due, nap in self._naps if not nap.stopped]
                if self._arrived or self._slices or self._tokens or self._group:
                    return True
                wait = min((due for due, _ in self._naps), default=float("inf")) - time.monotonic()
                if wait <= 0:
                    return True
                self._news.wait(None if wait == float("inf") else wait)
        return False

    def _turn(self) -> None:
        """One token for those who wait for one, then what fits into the gap."""
        with self._news:
            arrived, self._arrived = self._arrived, []
        for work in arrived:
            self._advance(work)
        if not self._tokens:
            self._bit(PIECE)
            return
        works = [self._tokens.popleft() for _ in range(min(len(self._tokens), self._slots.slots))]
        started = time.perf_counter()
        self._step(works)
        seconds = time.perf_counter() - started
        usual = self._usual[len(works)] = 0.9 * self._usual.get(len(works), seconds) + 0.1 * seconds
        waiting = len(self._slices) + len(self._asleep)
        gap = max(SHARE, waiting / len(works)) * usual  # as much for each that waits as for each that has its token
        # less after a token that took longer, so that no turn is much longer than others
        self._credit = min(self._credit + usual + gap - seconds, gap)
        while self._credit >= min(self._cost, gap) and (self._slices or self._group or self._due()):
            started = time.perf_counter()
            self._bit(BIT)
            seconds = time.perf_counter() - started
            self._credit -= seconds
            self._cost = max(seconds, 0.95 * self._cost)

    def _step(self, works: list[_Work]) -> None:
        """One token for each of `works`."""
        streams = [work.stream for work in works]
        try:
            for stream in streams:
                stream.wake_up()
                if stream not in self._slots.names:
                    while len(self._slots.names) >= self._slots.slots:
                        self.take(next(other for other in self._slots.names if other not in streams))
                    self._slots.put(stream, stream._moment.state)
                    stream._moment = stream._moment._replace(state=stream._moment.start)  # its own is in the slot
            logits = self._slots.read(streams, torch.cat([work.wants for work in works]))
        except Exception as error:
            for work in works:
                self._advance(work, error=error)
            return
        for work, row in zip(works, logits, strict=True):
            self._advance(work, row[None])

    def _bit(self, tokens: int) -> None:
        """One bit of a prompt, or of sleeps; in turn, if somebody waits for either."""
        if self._slices and not (self._asleep and self._prompt_was_last):
            self._advance(self._slices.popleft(), tokens)
            self._prompt_was_last = True
        else:
            self._sleep_on(tokens)
            self._prompt_was_last = False

    def _advance(self, work: _Work, wanted: Tensor | int | None = None, error: Exception | None = None) -> None:
        """Drive `work` to where it wants something next, with what it wanted."""
        try:
            turn = work.steps.send(wanted) if error is None else work.steps.throw(error)
        except StopIteration as done:
            self._answer(work, done.value)
        except BaseException as error:
            self._answer(work, error=error)
        else:
            work.wants = wants = turn.wants
            if work.cancelled:
                work.steps.close()
                self._answer(work)
            elif isinstance(wants, Nap):
                self._asleep.append(work)
            else:
                (self._slices if wants is None else self._tokens).append(work)

    def _answer(self, work: _Work, value: Any = None, error: BaseException | None = None) -> None:
        with self._news:
            self._unanswered.discard(work)
        if error is None:
            work.result.set_result(value)
        else:
            work.result.set_exception(error)

    def _due(self) -> list[Nap]:
        """Sleeps whose time has come; those that somebody waits for first."""
        now, waited_for = time.monotonic(), {id(work.wants) for work in self._asleep}
        return sorted((nap for due, nap in self._naps if due <= now and not nap.stopped), key=lambda nap: id(nap) not in waited_for)

    def _sleep_on(self, tokens: int) -> None:
        """One bit of the sleeps under way, or of the next ones."""
        if self._group is not None and all(nap.stopped for nap in self._group[0]):
            self._group = None
        if self._group is None:
            due = self._due()
            if not due:
                return
            naps = [due[0]] if self._tokens else [nap for nap in due if _place(nap) == _place(due[0])]
            self._group, most = (naps, self._together(naps)), None
        else:
            most = max(1, tokens // len(self._group[0]))
        naps, steps = self._group
        try:
            steps.send(most)
            return
        except StopIteration:
            pass
        except Exception as error:
            for nap in naps:
                nap.error = error
        self._group = None
        for nap in naps:
            nap.end()
            self.sleeps += nap.after is not None
        self._naps = [(due, nap) for due, nap in self._naps if nap not in naps]
        self._slices.extendleft(work for work in self._asleep if work.wants in naps)
        self._asleep = [work for work in self._asleep if work.wants not in naps]

    async def _together(self, naps: list[Nap]) -> None:
        """Sleeps of one place and size as one batch."""
        start = together([nap.before.start for nap in naps])
        state = await sweep.consolidation(self.model, torch.cat([nap.before.ids for nap in naps]), start, loops=naps[0].loops)
        for n, nap in enumerate(naps):
            if not nap.stopped:
                await nap.catch_up(one_of(state, n))


def _bytes(model: Model, slots: int, streams: int, context: int) -> int:
    sleeps = model.config.window is not None
    fast = size(model.init_state().fast) + model.config.vocab_size * model.embed.weight.element_size()  # and the last logits
    awake, start = fast + window_bytes(model, context), fast + window_bytes(model, kept(model, context) if sleeps else 0)
    # of a stream: what it has read, what it is reading, and the window's start; of a sleep that ends, the same again
    return slots * awake + streams * (2 if sleeps else 1) * (2 * awake + start)


def _place(nap: Nap) -> tuple[int, int, int | None]:
    """What sleeps must have in common to be one batch."""
    return int(nap.before.start.position), nap.before.ids.shape[1], nap.loops


class Stream(Session):
    """A session of one stream in a pool: the same calls, from any thread, one at a time. `close` makes room for another."""

    _goes_on = True

    def __init__(self, pool: SessionPool, moment: Moment) -> None:
        super().__init__(pool.model, 1, when=pool.schedule)
        self._pool = pool
        self._moment = moment._replace(hidden=None)  # `bytes` has no room for them
        self._busy = threading.Lock()

    def close(self) -> None:
        """Give the place to another stream."""
        with contextlib.suppress(ZooError):  # the pool is closed
            self._replace(self._moment)
        self._pool.forget(self)

    def fork(self) -> Stream:
        """A stream of the same pool that stands where this one does. Raises PoolFullError."""
        return self._pool.admit(self._look())

    def wake_up(self) -> None:
        """Take up a sleep that has ended, if nothing has been read since. Called in the scheduler's thread, before a token."""
        if self._nap is not None and self._nap.up_to_date:
            finish(self._settle())

    def _take(self) -> None:
        self._pool.take(self)

    def _replace(self, moment: Moment) -> None:
        async def replace() -> None:
            Session._replace(self, moment._replace(hidden=None))

        self._run(replace())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._submit(work).result.result()

    def _submit(self, steps: Coroutine[Any, Any, T]) -> _Work:
        """Busy until it has been answered."""
        if not self._busy.acquire(blocking=False):
            steps.close()
            raise BusyError("stream: it is busy with another call")
        work = _Work(self, request := self._request(steps))
        work.result.add_done_callback(lambda _: self._busy.release())
        try:
            self._pool.submit(work)
        except BaseException:
            steps.close()
            request.close()
            work.result.cancel()
            raise
        return work

    async def _request(self, steps: Coroutine[Any, Any, T]) -> T:
        """`steps`; after them, if nothing else comes, the stream may sleep."""
        result = await steps
        if self._nap is not None and self._nap.yields_to_tokens:
            assert self.schedule.pause is not None
            self._pool.begin(self._nap, self.schedule.pause)
        return result

    def _generate(self, prompt: Tensor, sampling: Sampling) -> Iterator[Tensor]:
        said: SimpleQueue[Tensor | None] = SimpleQueue()

        async def speak() -> None:
            sampler = Sampler(sampling, prompt, self.model.config.vocab_size)
            words = prompt
            for _ in range(sampling.tokens):
                said.put(await self._say(words, sampler))
                if sampler.over:
                    return
                words = prompt[:, :0]

        work = self._submit(speak())
        work.result.add_done_callback(lambda _: said.put(None))
        try:
            while (token := said.get()) is not None:
                yield token
        finally:
            work.cancelled = True  # whoever listened has gone
            if threading.current_thread() is not self._pool.thread:  # a garbage collection may run anywhere
                work.result.result()

    async def _wake(self, ids: Tensor) -> tuple[Tensor, Moment]:
        if ids.shape[1] > 1:
            self._take()
            return await reading(self.model, self._moment, ids[:, :PIECE])
        logits: Tensor = await Turn(ids)
        return logits, after_reading(self.model, self._moment, ids, logits, self._moment.state)

    async def _make_sure_of_room(self, tokens: int) -> None:
        await super()._make_sure_of_room(tokens)
        if self.model.config.window is None and self._moment.counts.tokens + tokens > self._pool.context:
            raise ZooError(f"ids: {tokens} tokens after {self._moment.counts.tokens}; the pool holds a context of {self._pool.context}")

    def _begin(self, nap: Nap, after: float = 0.0, *, wait: bool = False) -> None:
        self._nap = nap
        if not nap.yields_to_tokens:
            self._pool.begin(nap, after)

    async def _wait(self) -> None:
        while self._nap is not None and not self._nap.ended.is_set():
            await Turn(self._nap)
        await self._settle()
