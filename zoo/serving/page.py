"""The page at /: a chat that shows how the window fills, when the stream sleeps, and what a sleep changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse

FOLDER = Path(__file__).with_name("static")
FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
"""Files of the page by path. They contain nothing secret, so they need no API key."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serve the files of the page."""
    for path, name in FILES.items():
        app.add_route(path, _file(name), include_in_schema=False)


def _file(name: str) -> Callable[[Request], FileResponse]:
    return lambda request: FileResponse(FOLDER / name, headers=HEADERS)
