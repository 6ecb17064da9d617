"""Start and shutdown of the server: answers in progress are finished, or cut short when their time is up."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from zoo.serving.connections import BACKLOG, Gate, OncePerSecond

UNACCEPTED = 4096  # connections that the system may hold until they are accepted
MARGIN = 5  # seconds for responses to end after they have been cut short


class DrainingServer(uvicorn.Server):
    """A uvicorn server whose app refuses new requests from the first signal on, and ends those in progress `grace` seconds later."""

    def __init__(self, app: FastAPI, config: uvicorn.Config, grace: float) -> None:
        super().__init__(config)
        self.app, self.grace = app, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        server = self.app.state.server
        timer = threading.Timer(0 if server.draining else self.grace, server.cut_short)  # a second signal cuts answers short at once
        timer.daemon = True
        server.draining = True
        timer.start()
        super().handle_exit(sig, frame)
        self.force_exit = False  # requests end in order in any case

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(UNACCEPTED)  # what uvicorn asks for also bounds how many one turn of the event loop accepts
        self._log_started_message(sockets or [])  # uvicorn names only the addresses that it opens itself

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for connection in self.server_state.connections:
            cycle = getattr(connection, "cycle", None)
            if cycle is not None:
                cycle.message_event.set()  # requests that have not arrived in full notice that they are refused
        await super().shutdown(sockets)


def run(app: FastAPI, listener: socket.socket, grace: float) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain. Exits with status 130 after Ctrl-C."""
    host, port = listener.getsockname()[:2]
    http: Any = Gate(app.state.server.limits, app.state.server.largest_session).protocol
    config = uvicorn.Config(
        app, host=host, port=port, http=http, backlog=BACKLOG, access_log=False, timeout_graceful_shutdown=int(grace) + MARGIN
    )
    logging.getLogger("uvicorn.error").addFilter(OncePerSecond())  # bad requests may come by the thousand
    try:
        DrainingServer(app, config, grace).run([listener])
    except KeyboardInterrupt:  # uvicorn raises the signal again once it has ended
        sys.exit(130)
