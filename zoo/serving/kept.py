"""Sessions kept between requests, by id."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from threading import Lock

from zoo.serving.schemas import ApiError
from zoo.sessions.pool import PoolFullError, SessionPool
from zoo.sessions.session import Session

Messages = list[dict[str, str]]


@dataclass(eq=False)
class KeptSession:
    """A session and the messages that it has read."""

    session: Session
    used: float = field(default_factory=time.monotonic)
    busy: bool = False
    _count: int = 0
    _digest: str = ""

    def unread(self, messages: Messages) -> Messages:
        """Return the messages after those already read, or all of them if they do not begin with those."""
        begins = self._count < len(messages) and _digest(messages[: self._count]) == self._digest
        return messages[self._count :] if begins else messages

    def remember(self, messages: Messages) -> None:
        """Record the whole conversation, the answer included, as read."""
        self._count, self._digest = len(messages), _digest(messages)


class KeptSessions:
    """The sessions of one server. One request at a time uses a session.

    Args:
        idle: seconds without a request after which a session may be closed.
    """

    def __init__(self, pool: SessionPool, idle: float) -> None:
        self._pool, self._idle, self._lock = pool, idle, Lock()
        self._kept: dict[str, KeptSession] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def acquire(self, name: str | None) -> KeptSession:
        """Return the session with this id, opening it if there is none; without an id, a session for one request."""
        with self._lock:
            self._close_idle()
            kept = self._kept.get(name) if name else None
            if kept is not None and kept.busy:
                raise ApiError(409, f"session: '{name}' is busy with another request", "session", "session_busy")
            if kept is None:
                try:
                    kept = KeptSession(self._pool.open())
                except PoolFullError as error:
                    raise ApiError(429, f"{error}; try again later", None, "too_many_sessions") from None
                if name:
                    self._kept[name] = kept
            kept.busy = True
            return kept

    def release(self, name: str | None, kept: KeptSession) -> None:
        """End a request's use of its session."""
        kept.busy, kept.used = False, time.monotonic()
        if not name:
            kept.session.close()

    def delete(self, name: str) -> bool:
        """Close a session. Returns False if there is none with this id, or if it is busy."""
        with self._lock:
            kept = self._kept.get(name)
            if kept is None or kept.busy:
                return False
            del self._kept[name]
            kept.session.close()
            return True

    def _close_idle(self) -> None:
        now = time.monotonic()
        for name in [name for name, kept in self._kept.items() if not kept.busy and now - kept.used > self._idle]:
            self._kept.pop(name).session.close()


def _digest(messages: Messages) -> str:
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest() if messages else ""
