"""Sleeps that run beside a session, in a thread of its own."""

from __future__ import annotations

import threading
import time

import torch

from zoo.sessions.snapshot import Moment, Sleeper, consolidation, reading, slept
from zoo.state import State


class Nap:
    """One sleep on what a stream held at one moment. The stream itself is not touched, and may read on meanwhile.

    Args:
        yields_to_tokens: whether it is thrown away if a token comes before it has ended.
    """

    def __init__(self, model: Sleeper, moment: Moment, loops: int | None = None, *, yields_to_tokens: bool = False) -> None:
        self.model, self.loops, self.yields_to_tokens = model, loops, yields_to_tokens
        self.before = moment if moment.hidden else moment._replace(state=moment.start)
        """The stream when the sleep began; without its waking state, if the sleep does not go on from that."""
        self.latest = moment
        """The stream now: its session keeps this up to date."""
        self.after: Moment | None = None
        self.error: BaseException | None = None
        self.ended = threading.Event()
        self.begun = time.monotonic()
        self.seconds = 0.0
        self.stopped = False

    @torch.no_grad()
    def run(self) -> None:
        """To the end, or until it is stopped or fails; raises nothing."""
        self.begun = time.monotonic()
        try:
            work = self.work()
            try:
                while not self.stopped:
                    work.send(None)
            except StopIteration:
                return
            work.close()
        except BaseException as error:  # the session raises it from its next call
            self.error = error
        finally:
            self.end()

    def end(self) -> None:
        """Its result, or its error, is there."""
        self.seconds = time.monotonic() - self.begun
        self.ended.set()

    async def work(self) -> None:
        if not self.stopped:
            state = await consolidation(self.model, self.before, self.loops)
            await self.catch_up(state)

    async def catch_up(self, state: State) -> None:
        """Read again, in the state after the sleep, what the stream has read meanwhile."""
        after = slept(self.model, self.before, state)
        while (missed := self._missed(after)).shape[1]:
            _, after = await reading(self.model, after, missed)
        self.after = after

    @property
    def up_to_date(self) -> bool:
        """Whether its result is that of all that the stream has read."""
        return self.ended.is_set() and self.after is not None and not self._missed(self.after).shape[1]

    def stop(self) -> None:
        """Leave off after the bit under way, and forget it."""
        self.stopped = True

    async def commit(self) -> Moment:
        """The stream as if it had slept at once, at the moment the sleep began."""
        assert self.after is not None
        after = self.after
        if (missed := self._missed(after)).shape[1]:
            _, after = await reading(self.model, after, missed)
        now = self.latest
        if not after.ids.shape[1]:
            after = after._replace(logits=now.logits)
        counts = now.counts._replace(cached=after.counts.cached, sleeps=now.counts.sleeps + 1, asleep=now.counts.asleep + self.seconds)
        return after._replace(said=now.said, counts=counts)

    def _missed(self, after: Moment) -> torch.Tensor:
        return self.latest.ids[:, self.before.ids.shape[1] + after.ids.shape[1] :]


class Worker:
    """The thread that runs the sleeps of one session, each at its time. Knows sleeps, never the session."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._next: tuple[float, Nap] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="zoo-sleep", daemon=True)
        self._thread.start()

    def begin(self, nap: Nap, after: float = 0.0) -> None:
        """Run `nap` in `after` seconds, in place of one that has not begun."""
        with self._news:
            self._next = time.monotonic() + after, nap
            self._news.notify()

    def close(self) -> None:
        """Leave off, and end the thread."""
        with self._news:
            self._closed = True
            if self._next is not None:
                self._next[1].stop()
            self._news.notify()
        if threading.current_thread() is not self._thread:  # a garbage collection may run anywhere
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._news:
                while self._next is None or (wait := self._next[0] - time.monotonic()) > 0:
                    if self._closed:
                        return
                    self._news.wait(None if self._next is None else wait)
                nap = self._next[1]
            nap.run()
            with self._news:
                if self._next is not None and self._next[1] is nap:
                    self._next = None
            del nap
