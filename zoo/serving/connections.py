"""Connections of the server: their number, and the time and memory of requests that have not arrived in full, are bounded.

When a bound is reached, the connection that has waited longest for the rest of its request is closed. So clients that send nothing,
or half a request, cannot keep others out.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from zoo.serving.limits import Limits, is_import

FILES = 256  # files that are not connections, or belong to connections that are being closed
BACKLOG = 128  # connections that one turn of the event loop may accept
UNSENT = 2**12  # bytes of an answer that wait here and in the system for a client to read; by default, megabytes
BODIES = 64  # bodies of full size whose bytes may be held before they have arrived
IMPORTS = 4  # the same for sessions that are imported, which are larger


class OncePerSecond(logging.Filter):
    """Drops a message that was logged less than a second ago."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        text, now = record.getMessage(), time.monotonic()
        if now - self._last.get(text, -1.0) < 1:
            return False
        if len(self._last) > 100:
            self._last.clear()
        self._last[text] = now
        return True


class Gate:
    """The bounds on the connections of one server.

    Args:
        session: maximum size of a session that is imported, in bytes.
    """

    def __init__(self, limits: Limits, session: int) -> None:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.connections = max(1, min(limits.connections, files - FILES))
        """Maximum number of connections."""
        self.patience = limits.patience
        self.held = {False: BODIES * limits.body, True: IMPORTS * session}
        """Maximum bytes of all requests that have not arrived in full: of imports (True) and of others."""
        self.open: set[Connection] = set()
        self.waiting: dict[Connection, None] = {}
        """Connections without a whole request, the one that has waited longest first."""

    def protocol(self, *args: Any, **options: Any) -> Connection:
        """Return the protocol of a new connection, as uvicorn's option `http` makes them."""
        return Connection(self, *args, **options)

    def enforce(self) -> None:
        """Close connections that wait for a request until the bounds are kept."""
        over = len(self.open) - self.connections
        left = dict(self.held)
        for each in self.waiting:
            left[each.imports] -= each.held
        for each in list(self.waiting):
            if over > 0 or (each.held and left[each.imports] < 0):
                over, left[each.imports] = over - 1, left[each.imports] + each.held
                each.give_up()


class Connection(H11Protocol):
    """A connection that is closed if its next request takes too long, or if its client reads nothing for as long."""

    def __init__(self, gate: Gate, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._gate = gate
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self.held = 0
        """Bytes of a request that has not arrived in full."""
        self.imports = False
        """True while a session is imported."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(UNSENT)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
        self._gate.open.add(self)
        self._wait()
        self._gate.enforce()

    def data_received(self, data: bytes) -> None:
        self._wait()
        self.held += len(data)
        super().data_received(data)
        self.imports = self.conn.their_state is h11.SEND_BODY and is_import(self.scope["path"])
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._arrived()
        self._gate.enforce()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self._gate.patience, self.give_up)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._read()

    def connection_lost(self, exc: Exception | None) -> None:
        self._gate.open.discard(self)
        self._arrived()
        self._read()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE or self.transport.is_closing():  # it closes once the client has read everything
            self._wait()

    def give_up(self) -> None:
        """Close the connection without an answer."""
        self._gate.open.discard(self)  # it counts until it is lost otherwise, which takes another turn of the event loop
        self._arrived()
        self.transport.abort()

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self._gate.patience, self.give_up)
            self._gate.waiting[self] = None

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _arrived(self) -> None:
        self.held = 0
        self._gate.waiting.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
