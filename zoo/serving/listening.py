"""The address of the server. While the model is loaded, /health succeeds there, and every other request gets status 503."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from zoo.errors import ZooError
from zoo.serving.connections import BACKLOG, Gate
from zoo.serving.limits import Limits
from zoo.serving.schemas import ApiError


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at this address. Raises ZooError."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=BACKLOG)
    except OSError as error:
        raise ZooError(f"host {host}, port {port}: {error.strerror}") from None


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the address."""
    with suppress(OSError):
        return all(ipaddress.ip_address(found[4][0]).is_loopback for found in socket.getaddrinfo(host, None))
    return False


@contextmanager
def loading(listener: socket.socket, limits: Limits) -> Iterator[None]:
    """Answer requests inside the block, in which the model is loaded."""
    http: Any = Gate(limits).protocol
    server = uvicorn.Server(uvicorn.Config(_not_ready, http=http, lifespan="off", log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener.dup()],), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


async def _not_ready(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] == "/health":
        response = JSONResponse({"status": "ok"})
    else:
        error = ApiError(503, "the model is loading")
        response = JSONResponse(error.body, error.status, error.headers)
    await response(scope, receive, send)
