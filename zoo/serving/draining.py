"""Start and shutdown of the server: answers in progress are finished, or cut short when their time is up."""

from __future__ import annotations

import logging
import sys
import threading
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from zoo.serving.connections import BACKLOG, BODIES, Gate, OncePerSecond

MARGIN = 5  # seconds for responses to end after their streams have been closed


class DrainingServer(uvicorn.Server):
    """Server of uvicorn whose app refuses new requests from the first signal on, and closes its pool `grace` seconds later."""

    def __init__(self, app: FastAPI, config: uvicorn.Config, grace: float) -> None:
        super().__init__(config)
        self.app, self.grace = app, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        server = self.app.state.server
        server.draining = True
        timer = threading.Timer(self.grace, server.pool.close)
        timer.daemon = True
        timer.start()
        super().handle_exit(sig, frame)


def run(app: FastAPI, host: str, port: int, grace: float) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain. Exits with status 130 after Ctrl-C."""
    limits = app.state.server.limits
    gate: Any = Gate(limits.connections, limits.patience, BODIES * limits.body)
    config = uvicorn.Config(
        app, host=host, port=port, http=gate.protocol, backlog=BACKLOG, access_log=False, timeout_graceful_shutdown=int(grace) + MARGIN
    )
    logging.getLogger("uvicorn.error").addFilter(OncePerSecond())  # bad requests may come by the thousand
    try:
        DrainingServer(app, config, grace).run()
    except KeyboardInterrupt:  # uvicorn raises the signal again once it has ended
        sys.exit(130)
