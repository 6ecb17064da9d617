"""A call of a session that a pool has not answered yet."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

from zoo.sessions.host import Call, Stream, Wanted


class Pending:
    """A call that has not returned."""

    def __init__(self, stream: Stream, call: Call[Any]) -> None:
        self.stream, self.call = stream, call
        self.result: Future[Any] = Future()

    def end(self, value: Any = None, error: BaseException | None = None) -> None:
        """Set the result, or the error."""
        if error is None:
            self.result.set_result(value)
        else:
            self.result.set_exception(error)


class PendingEach(Pending):
    """Calls one after the other, whose results are in `results`; None follows the last one.

    Each waits until the caller wants it: a stream holds the tokens that its caller has seen, and no others, of which the last one is
    pending.
    """

    def __init__(self, stream: Stream, calls: Iterator[Call[Any]]) -> None:
        super().__init__(stream, self._run(calls))
        self.results: SimpleQueue[tuple[Any] | None] = SimpleQueue()
        self.made = self.taken = self.wanted = 0
        """Number of results, of those that the caller has taken, and of those after which it wanted another."""
        self.left = False
        """True if the caller takes no more results."""
        self._last: tuple[Any] | None = None

    async def _run(self, calls: Iterator[Call[Any]]) -> None:
        call = next(calls, None)
        try:
            while call is not None:
                result = await call
                call = next(calls, None)
                self.made += 1
                if call is None:
                    self._last = (result,)
                    return
                self.results.put((result,))
                await Wanted()
                if self.left:
                    return
        finally:
            if call is not None:
                call.close()

    def end(self, value: Any = None, error: BaseException | None = None) -> None:
        """Pass on the last result, too: only now, so that the stream is idle when its caller has it."""
        super().end(value, error)
        if self._last is not None:
            self.results.put(self._last)
        self.results.put(None)
