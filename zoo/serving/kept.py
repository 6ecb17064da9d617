"""A session kept between requests, and the tokens that its stream holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import torch
from torch import Tensor

from zoo.serving.prefixes import Prefixes, Sleeps, common_length
from zoo.serving.schemas import ApiError
from zoo.serving.store import Journal, Record
from zoo.sessions.host import WindowFullError
from zoo.sessions.session import Session
from zoo.sessions.snapshot import Counts, Snapshot

Messages = list[dict[str, Any]]
Ends = Callable[[], Iterable[int]]
STRIDE = 1024  # tokens of a long prompt after which a state is kept even in the middle of a message
PIECE = 256  # tokens of a prompt that are read at a time


@dataclass(eq=False)
class KeptSession:
    """A session, the tokens that its stream holds, and the conversation that they render.

    The stream always holds a prefix of the tokens that a request asks for: `read` continues from the stream itself,
    or from the nearest state in `prefixes`, and reads the rest.
    """

    session: Session
    prefixes: Prefixes
    empty: Snapshot
    """A stream before its first token."""
    owner: str
    name: str | None
    """Id of the session; None: it is closed after this request."""
    journal: Journal | None = None
    """The session's files in the store, if there is one."""
    tokens: list[int] = field(default_factory=list)
    """Tokens that the stream holds, its pending one included; during a request, those that it will hold."""
    messages: Messages = field(default_factory=list)
    """The conversation, with the last answer."""
    sleeps: int = 0
    asleep: float = 0.0
    """Number of sleeps during the current request, and seconds spent in them."""
    counted: Counts = field(default_factory=Counts)
    """Statistics of the stream when these were counted."""
    used: float = field(default_factory=time.monotonic)
    busy: bool = False
    saved: bool = False
    """True if its state is in the store, or was before another process took it over."""
    left: Event = field(default_factory=Event)
    """Set once the client of the current request has left."""

    @property
    def key(self) -> tuple[str, str]:
        return self.owner, self.name or ""

    def read(self, ids: list[int], ends: Ends = tuple, sleeps: Sleeps | None = None) -> int:
        """Make the stream hold exactly `ids`. Returns the number of tokens that were not read again.

        Args:
            ends: returns positions after which the state is worth keeping; it is kept after the last token in any case.
            sleeps: sleeps to repeat on the way, by default those that the stream has had; see `Snapshot.sleeps`.
        Raises:
            WindowFullError: the window has no room for them; the stream is as before.
            ApiError: the client has left; the stream holds some of them.
        """
        common = common_length(self.tokens, ids)
        with self._whole_or_not() as before:
            if sleeps is None:
                sleeps = tuple(sleep for sleep in before.sleeps if sleep[0] <= common)
            return self._read(ids, common, ends, sleeps)

    @contextmanager
    def _whole_or_not(self) -> Iterator[Snapshot]:
        """Leave the stream as it was, a snapshot of which is yielded, if its window has no room for what is read inside."""
        before, tokens = self.session.snapshot(), self.tokens
        try:
            yield before
        except WindowFullError:
            self.session.restore(before)
            self.tokens = tokens
            raise

    def _read(self, ids: list[int], common: int, ends: Ends, sleeps: Sleeps) -> int:
        at, found = self.prefixes.longest(self.owner, ids, sleeps, self.name)
        if common < len(self.tokens) or at > common:
            self.session.restore(found or self.empty)
            sleeps = sleeps[len(found.sleeps) if found else 0 :]
        else:
            at, sleeps = common, sleeps if not self.tokens else ()
        self.tokens, self.counted = ids, self.session.snapshot().counts
        if at < len(ids):
            again = dict(sleeps)
            worth = {*range(at - at % STRIDE + STRIDE, len(ids), STRIDE), *ends(), len(ids)}
            start = at
            for end in sorted(end for end in {*worth, *again, *range(at, len(ids), PIECE)} if at < end <= len(ids)):
                self.check_client()
                self._sleep_again(again.pop(start, None))
                self.session.read(self._tensor(ids[start:end]))
                start = end
                if end in worth:
                    self.prefixes.keep(self.owner, ids[:end], self.session.snapshot(), self.name)
            self._sleep_again(again.pop(start, None))
        return at

    def _sleep_again(self, loops: int | None) -> None:
        """Repeat a sleep that the stream has had at this position."""
        if loops is not None:
            self.session.read(self._tensor([]))  # the pending token
            self.session.sleep(loops)

    def score(self, ids: list[int]) -> Iterator[tuple[int, Tensor | None]]:
        """Read `ids` after the stream's tokens. Yields each with the logits [V] that predicted it; None before the first token.

        Raises:
            WindowFullError: the window has no room for them; the stream is as before.
        """
        if not self.name:
            self.session.restore(self.empty)
            self.tokens = []
        with self._whole_or_not():
            self.session.read(self._tensor([]))  # the pending token
            before, self.tokens = self.session.snapshot(), [*self.tokens, *ids]
            self.counted = before.counts
            last = None if before.logits is None else before.logits[0]
            for start in range(0, len(ids), PIECE):
                self.check_client()
                piece = ids[start : start + PIECE]
                logits = self.session.feed(self._tensor(piece))[0]
                for n, token in enumerate(piece):
                    yield token, logits[n - 1] if n else last
                last = logits[-1]

    def check_client(self) -> None:
        """Raise ApiError if the client of the current request has left."""
        if self.left.is_set():
            raise ApiError(499, "the client has left")

    def settle(self) -> None:
        """Keep in `tokens` only those that the stream has actually read or generated."""
        now = self.session.snapshot()
        self.sleeps += now.counts.sleeps - self.counted.sleeps
        self.asleep += now.counts.asleep - self.counted.asleep
        self.counted = now.counts
        self.tokens = self.tokens[: now.counts.tokens + now.pending.shape[1]]
        if self.tokens and now.logits is not None:
            self.prefixes.keep(self.owner, self.tokens, now, self.name)

    def store(self) -> None:
        """Write to the journal what has changed. Raises StoreError, PoolClosedError."""
        if self.journal is not None:
            now = self.session.snapshot()
            self.journal.write(Record(list(self.tokens), now.sleeps, list(self.messages), now.pending.shape[1]))

    def store_state(self) -> None:
        """Write the state, so that a restart need not read any token again. Raises StoreError, PoolClosedError."""
        if self.journal is not None:
            self.journal.write_snapshot(self.session)

    def recall(self, journal: Journal) -> None:
        """Restore the session from the store: load the newest state there and read the tokens after it again. Raises ZooError."""
        record, end = journal.stored, len(journal.stored.tokens) - journal.stored.pending
        if read := journal.restore(self.session):
            self.prefixes.keep(self.owner, record.tokens[:read], self.session.snapshot(), self.name)
        now = self.session.snapshot()
        if (read, now.sleeps, now.pending.shape[1]) != (len(record.tokens), record.sleeps, record.pending):
            self.session.restore(self.empty)
            self.tokens = []
            self.read(record.tokens[:end], sleeps=record.sleeps)
            self.session.read(self._tensor([]))  # the pending token of an older state
            self.session.restore(self.session.snapshot()._replace(pending=self._tensor(record.tokens[end:])))
        self.tokens = list(record.tokens)
        self.messages = list(record.messages)
        self.journal = journal

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], dtype=torch.int64, device=self.session.device)
