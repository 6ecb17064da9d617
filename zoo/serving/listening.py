"""The address of the server."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress

from zoo.errors import ZooError
from zoo.serving.connections import BACKLOG


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
