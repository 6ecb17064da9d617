"""Protection against web pages: the names under which the server may be addressed, and the pages that may read its answers."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from zoo.errors import ZooError
from zoo.serving.schemas import ApiError


def protect(app: FastAPI, hosts: Sequence[str], origins: Sequence[str]) -> None:
    """Refuse other hosts than these, and let pages of these origins read answers (CORS).

    Args:
        hosts: names besides localhost; "*": any name.
        origins: such as "https://example.com"; "*": any page. Without any, no CORS headers are sent.
    Raises:
        ZooError: a bad host or origin.
    """
    for host in hosts:
        if host != "*" and _name(host) != host.lower():
            raise ZooError(f"allow_host: '{host}'; want a name without a port, such as example.com, or *")
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", origin):
            raise ZooError(f"allow_origin: '{origin}'; want an origin such as https://example.com, or *")
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    if "*" not in hosts:
        app.add_middleware(AllowedHosts, hosts=hosts)


class AllowedHosts:
    """Middleware that refuses a request for another host: by DNS rebinding, a web page can reach a local server under its own name.

    Addresses such as 127.0.0.1 are allowed, since only names can be rebound; so are requests without a host, which no browser sends.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self.app, self.hosts = app, {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = dict(scope.get("headers", [])).get(b"host")
        if host is not None and not self._allows(host.decode("latin-1")):
            shown = host.decode("latin-1")[:80]
            error = ApiError(400, f"host: {shown!r}; allowed: addresses, {', '.join(sorted(self.hosts))}", "host", "host_not_allowed")
            await JSONResponse(error.body, error.status)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _allows(self, host: str) -> bool:
        name = _name(host)
        if name is None or name in self.hosts:
            return name is not None
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _name(host: str) -> str | None:
    """Return the name in a Host header, in lower case; None if it is no host."""
    try:
        split = urlsplit(f"//{host}")
        return split.hostname if split.netloc == host and "@" not in host else None
    except ValueError:
        return None
