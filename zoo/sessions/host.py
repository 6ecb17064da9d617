"""The contract between a session and its host, which runs it; and the simplest host, the calling thread."""

from __future__ import annotations

import weakref
from collections.abc import Coroutine, Generator, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.sessions.sleeping import Sleep, Worker
from zoo.sessions.sleeping_model import SleepingModel
from zoo.sessions.sliced import Slice, finish
from zoo.sessions.slots import Places
from zoo.sessions.snapshot import Snapshot, after_reading, one_of, together, wake
from zoo.signals import deferred

T = TypeVar("T")


class PoolFullError(ZooError):
    """The pool has no room for another stream."""


class WindowFullError(ZooError):
    """Under the schedule `manual`, the window has no room for the tokens."""


class BusyError(ZooError):
    """A stream received a call before its previous call had returned, or its generation had ended or been closed."""

    def __init__(self) -> None:
        super().__init__("stream: is busy with another call, or with a generation that was neither ended nor closed")


class PoolClosedError(ZooError):
    """The pool has been closed."""


@dataclass(frozen=True, eq=False)
class Token:
    """Request to read a token, ids [1, 1], in the next batch. The answer is its logits, [1, 1, V]."""

    ids: Tensor

    def __await__(self) -> Generator[Token, Tensor, Tensor]:
        return (yield self)


@dataclass(frozen=True, eq=False)
class SleepEnd:
    """Request to wait until a sleep has ended. The answer is None."""

    sleep: Sleep

    def __await__(self) -> Generator[SleepEnd, None, None]:
        yield self


@dataclass(frozen=True, eq=False)
class Wanted:
    """Request to wait until the caller wants another result, or has left. The answer is None."""

    def __await__(self) -> Generator[Wanted, None, None]:
        yield self


Request = Slice | Token | SleepEnd | Wanted
Answer = int | Tensor | None
Call = Coroutine[Request, Answer, T]
"""A call in progress. Its host answers the requests that it awaits; only the host itself requests a `Token` or a `SleepEnd`."""


@dataclass(eq=False)
class Stream:
    """The data that a session and its host share."""

    model: SleepingModel
    snapshot: Snapshot
    sleep: Sleep | None = None
    """The sleep in progress, or one that has ended but is not committed yet."""

    def advance(self, snapshot: Snapshot) -> None:
        """Replace the snapshot with one that has read more tokens."""
        self.snapshot = snapshot
        if self.sleep is not None:
            self.sleep.latest = snapshot

    async def collect_finished_sleep(self) -> None:
        """Commit the sleep if it has ended. Raises its error."""
        sleep = self.sleep
        if sleep is not None and sleep.ended.is_set():
            self.sleep = None
            if sleep.error is not None:
                raise sleep.error
            if sleep.after is not None:
                self.snapshot = await sleep.commit()

    def retract(self) -> None:
        """Remove the pending token."""
        self.advance(self.snapshot._replace(pending=self.snapshot.pending[:, :0]))

    def cancel_sleep(self) -> None:
        """Cancel the sleep, if there is one."""
        if self.sleep is not None:
            self.sleep.cancel()
            self.sleep = None


class Host(Protocol):
    """Runs the calls, wake passes and sleeps of sessions.

    A host may keep the waking state of a stream in slots; `snapshot.waking` is None meanwhile, and any other value replaces the
    state in the slots.
    """

    reads_while_asleep: bool
    """True if a sleep that is due before the window is full runs in the background."""
    single: bool
    """True if a session has one stream."""
    keeps_hidden: bool
    """True if sessions may keep hidden states, from which a sleep can continue."""
    context: int | None
    """Maximum number of tokens of a stream of a model that never sleeps; None: no limit."""

    def open(self, stream: Stream) -> Host:
        """Accept one more stream. Returns its host. Raises PoolFullError."""
        ...

    def close(self, stream: Stream) -> None:
        """Cancel the stream's background sleep and release what the host holds for it."""
        ...

    def run(self, stream: Stream, call: Call[T]) -> T:
        """Run a call to its end. Returns its result. Raises BusyError while another call of the stream is running."""
        ...

    def run_each(self, stream: Stream, calls: Iterator[Call[T]]) -> Iterator[T]:
        """Run calls one after the other, each after the result of the previous one was taken. Yields their results."""
        ...

    async def wake(self, stream: Stream, ids: Tensor, keep: int) -> tuple[Tensor, Snapshot]:
        """Run one wake pass over ids: [B, T], or over the first of them.

        Returns the logits of those that it has read and that are among the last `keep` of ids, and the snapshot afterwards.
        """
        ...

    def reclaim(self, stream: Stream) -> None:
        """Move the stream's waking state from slots back into its snapshot."""
        ...

    def begin(self, stream: Stream, sleep: Sleep, *, wait: bool) -> None:
        """Start a sleep: in the background, after its pause; or, if the caller waits for it, as soon as possible."""
        ...

    async def wait(self, sleep: Sleep) -> None:
        """Wait for a sleep that has begun to end."""
        ...


class Alone:
    """Host of one session: the caller's thread. Background sleeps run in a separate thread.

    Where that is faster, tokens are decoded in slots: on a GPU, one CUDA graph per token; on a CPU, with states in
    place, in a bundle and with compiled blocks.
    """

    reads_while_asleep = False
    single = False
    keeps_hidden = True
    context: int | None = None

    def __init__(self) -> None:
        self._slots: Places[int] | None = None
        self._worker: Worker | None = None
        self._generating = False

    def open(self, stream: Stream) -> Host:
        return Alone()

    def close(self, stream: Stream) -> None:
        stream.cancel_sleep()
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def run(self, stream: Stream, call: Call[T]) -> T:
        if self._generating:
            call.close()
            raise BusyError
        with torch.no_grad():
            return finish(call)

    def run_each(self, stream: Stream, calls: Iterator[Call[T]]) -> Iterator[T]:
        call = next(calls, None)
        while call is not None:
            result, call = self.run(stream, call), next(calls, None)
            if call is None:  # the stream is idle as soon as the last result is there
                yield result
                return
            self._generating = True
            try:
                yield result
            except BaseException:
                call.close()
                raise
            finally:
                self._generating = False

    async def wake(self, stream: Stream, ids: Tensor, keep: int) -> tuple[Tensor, Snapshot]:
        if ids.shape[1] == 1:
            if self._slots is None or self._slots.slots != len(ids):
                self.reclaim(stream)
                self._slots = stream.model.slots(len(ids))
            if self._slots is not None:
                return self._decode(stream, self._slots, ids)
        self.reclaim(stream)
        return wake(stream.model, stream.snapshot, ids, keep)

    def _decode(self, stream: Stream, slots: Places[int], ids: Tensor) -> tuple[Tensor, Snapshot]:
        """Run one wake pass over a token of each stream in slots."""
        if stream.snapshot.waking is not None:
            for n in range(len(ids)):
                slots.put(n, one_of(stream.snapshot.waking, n))
            stream.advance(stream.snapshot._replace(waking=None, hidden=None))
        with deferred():  # Ctrl-C must not come between the token and its record
            logits = slots.read(range(len(ids)), ids)
            after = after_reading(stream.model, stream.snapshot, ids, logits, None)
            stream.advance(after._replace(pending=after.pending[:, :0]))
        return logits, after

    def reclaim(self, stream: Stream) -> None:
        if stream.snapshot.waking is None:
            assert self._slots is not None
            states = [self._slots.take(n) for n in range(len(self._slots))]
            stream.snapshot = stream.snapshot._replace(waking=together(states))

    def begin(self, stream: Stream, sleep: Sleep, *, wait: bool) -> None:
        if wait:
            sleep.run()
            return
        if self._worker is None:
            self._worker = Worker()
            weakref.finalize(self, self._worker.close)
        self._worker.begin(sleep)

    async def wait(self, sleep: Sleep) -> None:
        sleep.ended.wait()
