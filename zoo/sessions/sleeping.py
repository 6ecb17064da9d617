"""One sleep of a stream, and the thread that runs the background sleeps of one session."""

from __future__ import annotations

import threading
import time

import torch
from torch import Tensor

from zoo.sessions.sleeping_model import SleepingModel
from zoo.sessions.snapshot import Snapshot, after_sleeping, one_of, together, wake_in_slices
from zoo.state import State
from zoo.system import release_threads


class Sleep:
    """One sleep on a snapshot. The stream itself is not modified, and may keep reading in the meantime.

    Args:
        loops: passes of the span, default as in the model's config.
        pause: seconds without a token before an idle sleep starts; a token cancels it. None: starts at once and runs to its end.
        usual: True for a sleep that follows from the tokens alone: at a full window, with the model's loops.
    """

    def __init__(
        self, model: SleepingModel, snapshot: Snapshot, loops: int | None = None, *, pause: float | None = None, usual: bool = False
    ) -> None:
        self.model, self.loops, self.pause = model, loops, pause
        self.event = () if usual else ((snapshot.counts.tokens, loops or model.config.loops),)
        """Entry for `Snapshot.sleeps`, if any."""
        self.before = snapshot if snapshot.hidden else snapshot._replace(waking=None)
        """The stream when the sleep began; with its waking state only if the sleep continues from that."""
        self.latest = snapshot
        """The stream now; its session keeps this up to date."""
        self.after: Snapshot | None = None
        """The result: the stream after the sleep, including the tokens that it has read since."""
        self.error: BaseException | None = None
        self.ended = threading.Event()
        self.begun = time.monotonic()
        self.seconds = 0.0
        self.cancelled = False

    @torch.no_grad()
    def run(self) -> None:
        """Run until the sleep ends, fails or is cancelled; raises nothing."""
        self.begun = time.monotonic()
        work = self.work()
        try:
            while not self.cancelled:
                work.send(None)
        except StopIteration:
            pass
        except BaseException as error:  # the session raises it from its next call
            self.error = error
        finally:
            work.close()
            self.end()

    def end(self) -> None:
        """Signal that the result, or the error, is available."""
        self.seconds = time.monotonic() - self.begun
        self.ended.set()

    async def work(self) -> None:
        """Consolidate the window, then catch up with the stream."""
        state = await self.model.consolidate_in_slices(self.before.ids, self.before.start, loops=self.loops, awake=self.before.awake)
        await self.catch_up(state)

    async def catch_up(self, state: State) -> None:
        """Read again, from the state after the sleep, the tokens that the stream has read in the meantime."""
        after = after_sleeping(self.model, self.before, state)._replace(sleeps=self.before.sleeps + self.event)
        while (missed := self._missed(after)).shape[1]:
            _, after = await wake_in_slices(self.model, after, missed, 1)
        self.after = after

    @property
    def up_to_date(self) -> bool:
        """True if the result covers everything that the stream has read."""
        return self.ended.is_set() and self.after is not None and not self._missed(self.after).shape[1]

    def cancel(self) -> None:
        """Stop after the current slice and discard the result."""
        self.cancelled = True

    async def commit(self) -> Snapshot:
        """The stream now, as if the sleep had been instantaneous. Only for a sleep that has a result."""
        assert self.after is not None
        after = self.after
        if (missed := self._missed(after)).shape[1]:
            _, after = await wake_in_slices(self.model, after, missed, 1)
        now = self.latest
        if not after.ids.shape[1]:
            after = after._replace(logits=now.logits)
        counts = now.counts._replace(cached=after.counts.cached, sleeps=now.counts.sleeps + 1, asleep=now.counts.asleep + self.seconds)
        return after._replace(pending=now.pending, counts=counts)

    def _missed(self, after: Snapshot) -> Tensor:
        return self.latest.ids[:, self.before.ids.shape[1] + after.ids.shape[1] :]


def batch_key(sleep: Sleep) -> tuple[int, int, int | None]:
    """Position, tokens and loops: sleeps that agree in them can run as one batch."""
    return int(sleep.before.start.position), sleep.before.ids.shape[1], sleep.loops


async def consolidate_together(sleeps: list[Sleep]) -> None:
    """Run sleeps with the same key as one batch."""
    start = together([sleep.before.start for sleep in sleeps])
    ids = torch.cat([sleep.before.ids for sleep in sleeps])
    state = await sleeps[0].model.consolidate_in_slices(ids, start, loops=sleeps[0].loops)
    for n, sleep in enumerate(sleeps):
        if not sleep.cancelled:
            await sleep.catch_up(one_of(state, n))


class Worker:
    """The thread that runs the background sleeps of one session, each when it is due. Holds no reference to the session."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next: tuple[float, Sleep] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="zoo-sleep", daemon=True)
        self._thread.start()

    def begin(self, sleep: Sleep) -> None:
        """Run `sleep` after its pause, in place of one that has not started."""
        with self._changed:
            self._next = time.monotonic() + (sleep.pause or 0.0), sleep
            self._changed.notify()

    def close(self) -> None:
        """Cancel the sleep and end the thread."""
        with self._changed:
            self._closed = True
            if self._next is not None:
                self._next[1].cancel()
            self._changed.notify()
        if threading.current_thread() is not self._thread:  # the garbage collector may run in any thread
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._next is None or (wait := self._next[0] - time.monotonic()) > 0:
                    if self._closed:
                        return
                    self._changed.wait(None if self._next is None else wait)
                sleep = self._next[1]
            sleep.run()
            release_threads()
            with self._changed:
                if self._next is not None and self._next[1] is sleep:
                    self._next = None
            del sleep
