"""Owners of sessions."""

from __future__ import annotations

from fastapi import Request


def owner_of(request: Request) -> str:
    """Return the identity of the owner of sessions: the API key, which was checked if the server has any."""
    return request.headers.get("authorization", "") if request.app.state.keyed else ""
