"""A call of a session that a pool has not answered yet."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

from zoo.sessions.host import Call, Stream, Taken


class Pending:
    """A call that has not returned."""

    def __init__(self, stream: Stream, call: Call[Any]) -> None:
        self.stream, self.call = stream, call
        self.result: Future[Any] = Future()


class PendingEach(Pending):
    """Calls one after the other, whose results are in `results`; None follows the last one.

    Each waits until the previous result was taken: a stream holds the tokens that its caller has seen, and no others.
    """

    def __init__(self, stream: Stream, calls: Iterator[Call[Any]]) -> None:
        super().__init__(stream, self._run(calls))
        self.results: SimpleQueue[tuple[Any] | None] = SimpleQueue()
        self.untaken = 0
        """Number of results that the caller has not taken."""
        self.left = False
        """True if the caller takes no more results."""
        self.result.add_done_callback(lambda _: self.results.put(None))

    async def _run(self, calls: Iterator[Call[Any]]) -> None:
        for call in calls:
            self.results.put((await call,))
            await Taken()
            if self.untaken:
                self.stream.retract()
                return
