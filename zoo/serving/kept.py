"""Sessions kept between requests, by id, and the tokens that their streams hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from zoo.serving.prefixes import Prefixes, common_length
from zoo.serving.schemas import ApiError
from zoo.sessions.pool import PoolFullError, SessionPool
from zoo.sessions.session import Session
from zoo.sessions.snapshot import Snapshot

Messages = list[dict[str, Any]]
Ends = Callable[[], Iterable[int]]
STRIDE = 1024  # tokens of a long prompt after which a state is kept even in the middle of a message
PIECE = 256  # tokens of a prompt whose logits are computed at a time


@dataclass(eq=False)
class KeptSession:
    """A session, the tokens that its stream holds, and the conversation that they render.

    The stream always holds a prefix of the tokens that a request asks for: `read` keeps what agrees with them, continues from the
    nearest state in `prefixes` and reads the rest.
    """

    session: Session
    prefixes: Prefixes
    empty: Snapshot
    """A stream before its first token."""
    owner: str
    name: str | None
    """None: the session is closed after this request."""
    tokens: list[int] = field(default_factory=list)
    """Tokens that the stream holds, its pending one included; during a request, those that it is to hold."""
    messages: Messages = field(default_factory=list)
    """The conversation, with the last answer."""
    used: float = field(default_factory=time.monotonic)
    busy: bool = False

    def read(self, ids: list[int], ends: Ends = tuple) -> int:
        """Make the stream hold exactly `ids`. Returns the number of tokens that were not read again.

        Args:
            ends: returns positions after which the state is worth keeping; it is kept after the last token in any case.
        """
        common = common_length(self.tokens, ids)
        sleeps = tuple(sleep for sleep in self.session.snapshot().sleeps if sleep[0] <= common)
        at, found = self.prefixes.longest(self.owner, ids, sleeps, self.name)
        if common < len(self.tokens) or at > common:
            self.session.restore(found or self.empty)
            sleeps = sleeps[len(found.sleeps) if found else 0 :]
        else:
            at, sleeps = common, ()
        self.tokens = ids
        if at < len(ids):
            again = dict(sleeps)
            worth = {*range(at - at % STRIDE + STRIDE, len(ids), STRIDE), *ends(), len(ids)}
            start = at
            for end in sorted(end for end in {*worth, *again} if at < end <= len(ids)):
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
        """Read `ids` after the stream's tokens. Yields each with the logits [V] that predicted it; None before the first token."""
        if not self.name:
            self.session.restore(self.empty)
            self.tokens = []
        self.session.read(self._tensor([]))  # the pending token
        before, self.tokens = self.session.snapshot().logits, [*self.tokens, *ids]
        last = None if before is None else before[0]
        for start in range(0, len(ids), PIECE):
            piece = ids[start : start + PIECE]
            logits = self.session.feed(self._tensor(piece))[0]
            for n, token in enumerate(piece):
                yield token, logits[n - 1] if n else last
            last = logits[-1]

    def settle(self) -> None:
        """Record the tokens that the stream holds: those that it was to hold, as far as it has come."""
        now = self.session.snapshot()
        self.tokens = self.tokens[: now.counts.tokens + now.pending.shape[1]]
        if self.tokens:
            self.prefixes.keep(self.owner, self.tokens, now, self.name)

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], dtype=torch.int64, device=self.session.device)


class KeptSessions:
    """The sessions of one server, each bound to the API key of its owner. One request at a time uses a session.

    Args:
        idle: seconds without a request after which a session may be closed.
        prefixes: states that sessions of one owner share.
    """

    def __init__(self, pool: SessionPool, idle: float, prefixes: Prefixes) -> None:
        self.prefixes = prefixes
        self._pool, self._idle, self._lock = pool, idle, Lock()
        self._kept: dict[tuple[str, str], KeptSession] = {}
        first = pool.open()
        self._empty = first.snapshot()
        first.close()

    def __len__(self) -> int:
        return len(self._kept)

    def acquire(self, owner: str, name: str | None) -> KeptSession:
        """Return the session with this id, opening it if there is none; without an id, a session for one request."""
        with self._lock:
            self._close_idle()
            kept = self._kept.get((owner, name)) if name else None
            if kept is not None and kept.busy:
                raise ApiError(409, f"session: '{name}' is busy with another request", "session", "session_busy")
            if kept is None:
                try:
                    kept = KeptSession(self._pool.open(), self.prefixes, self._empty, owner, name)
                except PoolFullError as error:
                    raise ApiError(429, f"{error}; try again later", None, "too_many_sessions") from None
                if name:
                    self._kept[owner, name] = kept
            kept.busy = True
            return kept

    def release(self, kept: KeptSession) -> None:
        """End a request's use of its session."""
        kept.busy, kept.used = False, time.monotonic()
        if not kept.name:
            kept.session.close()

    def delete(self, owner: str, name: str) -> bool:
        """Close a session and forget its states. Returns False if there is none with this id, or if it is busy."""
        with self._lock:
            kept = self._kept.get((owner, name))
            if kept is None or kept.busy:
                return False
            del self._kept[owner, name]
            kept.session.close()
            self.prefixes.forget(owner, name)
            return True

    def _close_idle(self) -> None:
        now = time.monotonic()
        for key in [key for key, kept in self._kept.items() if not kept.busy and now - kept.used > self._idle]:
            self._kept.pop(key).session.close()
