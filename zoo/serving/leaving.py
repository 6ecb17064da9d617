"""Clients that leave before they are answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from threading import Event

from fastapi import Request


async def notice(request: Request) -> AsyncIterator[None]:
    """Set the event `request.state.left` once the client has disconnected. A dependency of a route."""
    left = request.state.left = Event()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        left.set()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
