"""Where a server keeps sessions: what `store.py` needs of a folder, or of an object store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from zoo.checkpoints.plain import one_line
from zoo.errors import ZooError
from zoo.sessions.pool import PoolClosedError
from zoo.sessions.session import Session

ABOUT = "session.json"


class StoreError(ZooError):
    """A session cannot be written to the store, or read back."""


class TakenOverError(StoreError):
    """Another process owns the session now."""


class Place(Protocol):
    """The files of one session: what identifies it, its journal, and its states.

    Every method raises StoreError, and those after `take_over` raise TakenOverError if another process owns the session now.
    """

    name: str
    """Name of the journal in errors."""
    size: int
    """Bytes of complete lines in the journal."""
    whole: bool
    """True if the next line must not depend on those before it, so that it must go to `rewrite`."""

    def about(self, new: dict[str, str]) -> dict[str, Any]:
        """Return the fields that identify the session: `new`, which is written, unless there is a journal."""

    def take_over(self) -> bytes:
        """Become the owner of the session. Returns the journal."""

    def append(self, line: bytes) -> None:
        """Write a line to the journal; an error leaves the journal as it was."""

    def rewrite(self, content: bytes) -> None:
        """Replace the journal; an error leaves the journal as it was."""

    def state(self, tokens: list[int]) -> str:
        """Return a name for the state after these tokens."""

    def save(self, session: Session, state: str) -> None:
        """Write the state of a session."""

    def load(self, session: Session, state: str) -> None:
        """Read a state into a session."""

    def tidy(self, state: str) -> None:
        """Remove every other state, and what killed processes or former owners left."""

    def check(self) -> None:
        """Do nothing if the session is still ours."""

    def delete(self) -> None:
        """Remove the session."""


class Places(Protocol):
    """The sessions of a store, each by a name of 32 hexadecimal digits."""

    def abouts(self) -> Iterator[dict[str, Any]]:
        """Yield the fields that identify each session with a journal. Raises StoreError, OSError."""

    def exists(self, name: str) -> bool:
        """Return whether a session was stored, not only opened before the process was killed. Raises StoreError, OSError."""

    def place(self, name: str) -> Place:
        """Return the place of a session, which need not exist."""

    def check(self) -> None:
        """Write a file of the size of a small state, and remove it. Raises StoreError."""


@contextmanager
def failures(place: object, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of these kinds, and every ZooError, into a StoreError."""
    try:
        yield
    except (StoreError, PoolClosedError):
        raise
    except ZooError as error:
        raise StoreError(f"store: {error}") from error
    except kinds as error:
        raise StoreError(f"store: {place}: {getattr(error, 'strerror', None) or one_line(error)}") from error


def read_fields(content: bytes, file: object) -> dict[str, Any]:
    """Return the fields in a JSON file. Raises StoreError."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"store: {file}: cannot be read: {one_line(error)}") from None
    return fields if isinstance(fields, dict) else {}
