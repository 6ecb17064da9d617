"""Methods of routes: HEAD works where GET does, and a refusal names all methods of its path."""

from __future__ import annotations

from fastapi import Request
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send


class HeadAsGet:
    """Middleware that answers HEAD as GET. The server, which knows what was asked, leaves out the body."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app({**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope, receive, send)


def methods_of(request: Request) -> str:
    """Return the methods of the request's path, as the header Allow lists them."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    methods = {method for route in routes for method in route.methods}
    return ", ".join(sorted(methods | {"HEAD"} if "GET" in methods else methods))
