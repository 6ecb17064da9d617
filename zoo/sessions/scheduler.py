"""The thread that runs the streams of a pool: tokens of all streams in one batch, sleeps and prompts in slices between them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.sessions.host import Answer, BusyError, Call, Host, PoolClosedError, PoolFullError, SleepEnd, Stream, Token, Wanted
from zoo.sessions.pending import Pending, PendingEach
from zoo.sessions.sleep_queue import SleepQueue
from zoo.sessions.sleeping import Sleep
from zoo.sessions.sliced import finish
from zoo.sessions.slots import Places
from zoo.sessions.snapshot import Snapshot, after_reading, wake_in_slices
from zoo.system import release_threads

T = TypeVar("T")
SLICE = 32  # tokens per slice while a stream is waiting for a token
LONG_SLICE = 256  # tokens per slice otherwise, and tokens of a prompt that are read in one pass
SHARE = 0.25  # of the usual time of a token: the time for background sleeps after it
REST = 0.005  # seconds without work after which the pool's thread lets go of those that compute with it
MOST = 2.0  # times the usual time of a token: the longest time for prompts and sleeps after it


class Scheduler:
    """Host of all streams in a pool.

    Every turn reads one token for each stream that requests one, in one batch. Prompts and sleeps run in slices, one block over up
    to `SLICE` tokens: after a batch of tokens for `SHARE` of its usual time, up to `MOST` times that if streams wait for prompts and
    sleeps; all the time if none requests a token. Sleeps that start at the same position with the same number of tokens while no stream
    requests a token run as one batch.

    Args:
        slots: buffers that hold the states of streams while their tokens are read.
        streams: maximum number of open streams.
        context: maximum number of tokens in a window cache.
    """

    reads_while_asleep = True
    single = True
    keeps_hidden = False

    def __init__(self, slots: Places[Stream], streams: int, context: int) -> None:
        self.streams = streams
        self.context: int | None = context
        self.sleeps = SleepQueue()
        self._slots = slots
        self._open: set[Stream] = set()
        self._changed = threading.Condition()
        self._calls: dict[Stream, Pending] = {}
        """The call of each busy stream."""
        self._arrived: list[Pending] = []
        """Calls that have not started, and those whose last result was taken."""
        self._for_callers: set[PendingEach] = set()
        """Calls that wait until their last result is taken."""
        self._expected: set[PendingEach] = set()
        """Calls among these for which the next batch of tokens waits a moment."""
        self._in_slices: deque[Pending] = deque()
        """Calls that request a slice."""
        self._for_tokens: deque[tuple[Pending, Tensor]] = deque()
        """Calls that request a token to be read."""
        self._for_sleeps: list[tuple[Pending, Sleep]] = []
        """Calls that wait for a sleep."""
        self._usual: dict[int, float] = {}
        """Seconds that a batch of n tokens usually takes."""
        self._credit = self._cost = 0.0
        """Time budget left for slices, and the cost of the most expensive recent slice, in seconds."""
        self._patience = 0.0
        """Seconds that the next batch waits for streams whose last token has not been taken."""
        self._prompt_was_last = self._closed = False
        self._failure: BaseException | None = None
        self.thread = threading.Thread(target=self._serve, name="zoo-pool", daemon=True)
        self.thread.start()

    def __len__(self) -> int:
        """Number of open streams."""
        return len(self._open)

    @property
    def waiting(self) -> dict[str, int]:
        """Number of calls that wait for a slice of a prompt, for a token to be read, and for a sleep."""
        return {"prompt": len(self._in_slices), "token": len(self._for_tokens), "sleep": len(self._for_sleeps)}

    # Methods of the host that run in the threads of the callers.

    def open(self, stream: Stream) -> Host:
        release_threads()  # of the caller: from now on, the pool's thread computes
        with self._changed:
            self._check_running()
            if len(self._open) >= self.streams:
                raise PoolFullError(f"streams: {self.streams} are open, and no more are allowed; close one first")
            self._open.add(stream)
        return self

    def close(self, stream: Stream) -> None:
        async def release() -> None:
            stream.cancel_sleep()
            if stream in self._slots:
                self._slots.take(stream)

        with contextlib.suppress(ZooError):  # the pool is closed
            if isinstance(generation := self._calls.get(stream), PendingEach):
                self._leave(generation)
                generation.result.result()
            self.run(stream, release())
        with self._changed:
            self._open.discard(stream)

    def run(self, stream: Stream, call: Call[T]) -> T:
        self._submit(pending := Pending(stream, call))
        return pending.result.result()

    def run_each(self, stream: Stream, calls: Iterator[Call[T]]) -> Iterator[T]:
        async def retract() -> None:
            stream.retract()

        self._submit(pending := PendingEach(stream, calls))
        try:
            while (result := pending.results.get()) is not None:
                pending.taken += 1
                yield result[0]
                self._resume(pending, wanted=1)
            if pending.left:
                raise ZooError("stream: is closed")
            pending.result.result()
        finally:
            self._leave(pending)
            if threading.current_thread() is not self.thread:  # the garbage collector may run in any thread
                with contextlib.suppress(ZooError):  # the caller has it already, or has left
                    pending.result.result()
                    if pending.taken < pending.made:  # the caller was interrupted while it waited
                        self.run(stream, retract())

    def _submit(self, pending: Pending) -> None:
        try:
            with self._changed:
                self._check_running()
                if pending.stream not in self._open:
                    raise ZooError("stream: is closed")
                if pending.stream in self._calls:
                    raise BusyError
                self._calls[pending.stream] = pending
                self._arrived.append(pending)
                self._changed.notify()
        except ZooError:
            pending.call.close()
            raise

    def _check_running(self) -> None:
        if self._failure is not None:
            raise ZooError(f"pool: has failed: {self._failure}") from self._failure
        if self._closed:
            raise PoolClosedError("pool: is closed")

    def _leave(self, pending: PendingEach) -> None:
        """End a call whose results are no longer taken."""
        pending.left = True
        self._resume(pending)

    def _resume(self, pending: PendingEach, wanted: int = 0) -> None:
        """Continue a call that waits for its caller."""
        with self._changed:
            pending.wanted += wanted
            if pending in self._for_callers:
                self._for_callers.remove(pending)
                self._expected.discard(pending)
                self._arrived.append(pending)
                if not self._expected:
                    self._changed.notify()

    def stop(self) -> None:
        """Cancel everything and end the thread. Pending calls raise PoolClosedError."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self.thread.join()

    # Methods of the host that calls use, in the scheduler's thread.

    async def wake(self, stream: Stream, ids: Tensor, keep: int) -> tuple[Tensor, Snapshot]:
        if (tokens := ids.shape[1]) > 1:
            self.reclaim(stream)
            return await wake_in_slices(stream.model, stream.snapshot, ids[:, :LONG_SLICE], max(0, keep - max(0, tokens - LONG_SLICE)))
        logits = await Token(ids)
        return logits, after_reading(stream.model, stream.snapshot, ids, logits, None)

    def reclaim(self, stream: Stream) -> None:
        if stream in self._slots:
            state = self._slots.take(stream)
            if stream.snapshot.waking is None:
                stream.snapshot = stream.snapshot._replace(waking=state)

    def begin(self, stream: Stream, sleep: Sleep, *, wait: bool) -> None:
        if sleep.pause is None:  # a pause starts when the call has returned
            self.sleeps.add(sleep)

    async def wait(self, sleep: Sleep) -> None:
        if not sleep.ended.is_set():
            await SleepEnd(sleep)

    # The scheduler's thread.

    def _serve(self) -> None:
        try:
            with torch.no_grad():
                while self._wait_for_work():
                    self._turn()
            error: BaseException = PoolClosedError("pool: is closed")
        except BaseException as failure:
            self._failure = error = failure
        with self._changed:
            self._closed = True
            calls, self._calls = list(self._calls.values()), {}
        self.sleeps.close()
        for pending in calls:
            pending.call.close()
            pending.end(error=error)

    def _wait_for_work(self) -> bool:
        """Block until there is something to do. Returns False once the pool is closed."""
        rested = False
        with self._changed:
            while not self._closed:
                if self._arrived or self._expected or self._in_slices or self._for_tokens or self.sleeps.in_progress:
                    return True
                if (wait := self.sleeps.seconds_until_due()) <= 0:
                    return True
                if rested:
                    self._changed.wait(None if wait == float("inf") else wait)
                elif not self._changed.wait(min(wait, REST)):
                    release_threads()
                    rested = True
        return False

    def _turn(self) -> None:
        """Read one token for each stream that requests one, then run the slices that fit into the gap."""
        with self._changed:
            self._changed.wait_for(lambda: not self._expected, self._patience)
            self._expected.clear()
            arrived, self._arrived = self._arrived, []
        for pending in arrived:
            self._advance(pending)
        if not self._for_tokens:
            self._run_slice(LONG_SLICE)
            return
        batch = [self._for_tokens.popleft() for _ in range(min(len(self._for_tokens), self._slots.slots))]
        started = time.perf_counter()
        self._read_tokens(batch)
        seconds = time.perf_counter() - started
        usual = self._usual[len(batch)] = 0.9 * self._usual.get(len(batch), seconds) + 0.1 * seconds
        self._patience = SHARE * usual
        waiting = len(self._in_slices) + len(self._for_sleeps)
        gap = min(max(SHARE, waiting / len(batch)), MOST) * usual  # equal time for every stream that waits, for a token or for slices
        # less after a token that took longer, so that no turn is much longer than others
        self._credit = min(self._credit + usual + gap - seconds, gap)
        while self._credit >= min(self._cost, gap) and (self._in_slices or self.sleeps.in_progress or self.sleeps.due()):
            started = time.perf_counter()
            self._run_slice(SLICE)
            seconds = time.perf_counter() - started
            self._credit -= seconds
            self._cost = max(seconds, 0.95 * self._cost)

    def _read_tokens(self, batch: list[tuple[Pending, Tensor]]) -> None:
        """Read one token for each call in the batch."""
        streams = [pending.stream for pending, _ in batch]
        try:
            for stream in streams:
                self._put_in_slot(stream, streams)
            logits = self._slots.read(streams, torch.cat([ids for _, ids in batch]))
        except Exception as error:
            for pending, _ in batch:
                self._advance(pending, error=error)
            return
        for (pending, _), row in zip(batch, logits, strict=True):
            self._advance(pending, row[None])

    def _put_in_slot(self, stream: Stream, batch: list[Stream]) -> None:
        """Put the stream's state in a slot, if necessary in place of a stream outside the batch."""
        if stream.sleep is not None and stream.sleep.up_to_date:  # it has ended since the token was requested
            finish(stream.collect_finished_sleep())
        state = stream.snapshot.waking
        if state is None:
            return
        while stream not in self._slots and len(self._slots) >= self._slots.slots:
            self.reclaim(next(other for other in self._slots if other not in batch))
        self._slots.put(stream, state)
        stream.advance(stream.snapshot._replace(waking=None, hidden=None))

    def _run_slice(self, tokens: int) -> None:
        """Run one slice of a prompt or of sleeps; alternate if calls wait for both."""
        self._prompt_was_last = bool(self._in_slices) and not (self._for_sleeps and self._prompt_was_last)
        if self._prompt_was_last:
            self._advance(self._in_slices.popleft(), tokens)
        else:
            self._run_sleeps(tokens)

    def _advance(self, pending: Pending, answer: Answer = None, error: Exception | None = None) -> None:
        """Answer the request of a call, and queue its next one."""
        try:
            request = pending.call.send(answer) if error is None else pending.call.throw(error)
        except StopIteration as done:
            return self._return(pending, done.value)
        except BaseException as raised:
            return self._return(pending, error=raised)
        if isinstance(request, Wanted):
            assert isinstance(pending, PendingEach)
            with self._changed:
                if pending.wanted < pending.made and not pending.left:
                    self._for_callers.add(pending)
                    self._expected.add(pending)
                else:
                    self._arrived.append(pending)
        elif isinstance(pending, PendingEach) and pending.left:
            pending.call.close()
            self._return(pending)
        elif isinstance(request, Token):
            self._for_tokens.append((pending, request.ids))
        elif isinstance(request, SleepEnd):
            self._for_sleeps.append((pending, request.sleep))
        else:
            self._in_slices.append(pending)

    def _return(self, pending: Pending, value: Any = None, error: BaseException | None = None) -> None:
        """Pass the result of a call, or its error, to the caller. From now on the stream is idle."""
        sleep = pending.stream.sleep
        if sleep is not None and sleep.pause is not None and sleep not in self.sleeps:
            self.sleeps.add(sleep, sleep.pause)
        with self._changed:
            self._calls.pop(pending.stream, None)
        pending.end(value, error)

    def _run_sleeps(self, tokens: int) -> None:
        """Run one slice of sleeps; those that calls wait for come first."""
        awaited = [sleep for _, sleep in self._for_sleeps]
        ended = self.sleeps.run(tokens, awaited, alone=bool(self._for_tokens))
        self._in_slices.extendleft(pending for pending, sleep in self._for_sleeps if sleep in ended)
        self._for_sleeps = [(pending, sleep) for pending, sleep in self._for_sleeps if sleep not in ended]
