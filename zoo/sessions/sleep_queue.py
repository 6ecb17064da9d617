"""The sleeps of the streams of a pool, run in slices, one batch at a time."""

from __future__ import annotations

import time
from collections.abc import Collection, Coroutine
from typing import Any

from zoo.sessions.sleeping import Sleep, batch_key, consolidate_together


class SleepQueue:
    """Sleeps that have not ended. Those that start at the same position with the same number of tokens can run as one batch."""

    def __init__(self) -> None:
        self.ended = 0
        """Number of sleeps that have ended with a result."""
        self.seconds = 0.0
        """Seconds from their start to their end, of all of them."""
        self._sleeps: list[tuple[float, Sleep]] = []
        """Each sleep, and when it is due."""
        self._batch: tuple[list[Sleep], Coroutine[Any, int | None, None]] | None = None
        """The sleeps in progress."""

    def __contains__(self, sleep: Sleep) -> bool:
        return any(sleep is other for _, other in self._sleeps)

    def add(self, sleep: Sleep, pause: float = 0.0) -> None:
        """Add a sleep that is due after a pause, in seconds. Those that were cancelled are dropped."""
        self._sleeps = [(due, other) for due, other in self._sleeps if not other.cancelled]
        self._sleeps.append((time.monotonic() + pause, sleep))

    @property
    def in_progress(self) -> bool:
        return self._batch is not None

    def seconds_until_due(self) -> float:
        """Return the time until the next sleep is due, infinity if there is none."""
        return min((due for due, sleep in self._sleeps if not sleep.cancelled), default=float("inf")) - time.monotonic()

    def due(self, first: Collection[Sleep] = ()) -> list[Sleep]:
        """Return the sleeps that are due, those in `first` before the others."""
        now = time.monotonic()
        due = [sleep for at, sleep in self._sleeps if at <= now and not sleep.cancelled]
        return sorted(due, key=lambda sleep: sleep not in first)

    def run(self, tokens: int, first: Collection[Sleep] = (), *, alone: bool = False) -> list[Sleep]:
        """Run one slice of up to `tokens` tokens of the sleeps in progress, or start the next ones.

        Args:
            first: sleeps that start before the others.
            alone: start a single sleep, not a batch.
        Returns:
            The sleeps that have ended.
        """
        if self._batch is not None and all(sleep.cancelled for sleep in self._batch[0]):
            self.close()
        if self._batch is None:
            due = self.due(first)
            if not due:
                return []
            sleeps = due[:1] if alone else [sleep for sleep in due if batch_key(sleep) == batch_key(due[0])]
            self._batch, most = (sleeps, consolidate_together(sleeps)), None
        else:
            most = max(1, tokens // len(self._batch[0]))
        sleeps, work = self._batch
        try:
            work.send(most)
            return []
        except StopIteration:
            pass
        except Exception as error:
            for sleep in sleeps:
                sleep.error = error
        self._batch = None
        for sleep in sleeps:
            sleep.end()
            if sleep.after is not None:
                self.ended += 1
                self.seconds += sleep.seconds
        self._sleeps = [(due, sleep) for due, sleep in self._sleeps if sleep not in sleeps]
        return sleeps

    def close(self) -> None:
        """Stop the sleeps in progress."""
        if self._batch is not None:
            self._batch[1].close()
            self._batch = None
