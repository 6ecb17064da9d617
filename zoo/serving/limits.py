"""Limits on what clients may ask of a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of one server."""

    body: int = 2**20
    """Maximum size of a request's body, in bytes."""
    prompt: int = 32_768
    """Maximum number of tokens that a request may add to its session."""
    tokens: int = 4_096
    """Maximum number of tokens in an answer."""
    idle: float = 3_600.0
    """Seconds without a request after which a session may be closed."""
    prefixes: int = 2**28
    """Maximum size of the states that later prompts may continue from, in bytes."""
    connections: int = 1_000
    """Maximum number of connections."""
    patience: float = 30.0
    """Seconds that a client may take to send a request, or to read a part of an answer."""
    queue: int = 64
    """Maximum number of requests that wait for a free stream."""
    wait: float = 10.0
    """Seconds that a request may wait for a free stream."""


def is_import(path: str) -> bool:
    """Return whether requests for this path import a session, whose size has a limit of its own."""
    return path.endswith("/import")
