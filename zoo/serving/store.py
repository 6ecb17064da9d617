"""Sessions kept after the process ends: for each a journal of what has changed with every request, and a snapshot of its state."""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.serving.folders import Folders
from zoo.serving.places import Place, Places, StoreError, TakenOverError
from zoo.serving.prefixes import Sleeps
from zoo.sessions.session import Session

LONG_JOURNAL = 2**20  # bytes after which a journal is rewritten


class OtherServerError(StoreError):
    """The session was stored by a server of another model, or with other settings."""


@dataclass
class Record:
    """Everything about a session except its states, which can be recomputed from it."""

    tokens: list[int] = field(default_factory=list)
    sleeps: Sleeps = ()
    messages: list[dict[str, Any]] = field(default_factory=list)
    pending: int = 0
    """Number of tokens at the end that have been generated and not read, 0 or 1."""


@dataclass
class Journal:
    """The journal of one session: each line holds what has changed, and is stored before a request ends.

    A line is valid only if it is complete: its first field is a checksum of the rest.
    """

    place: Place
    stored: Record = field(default_factory=Record)
    """The session as recorded in the journal."""
    snapshot: int = 0
    """Number of tokens after which the state is in a file; 0: there is none."""

    @property
    def long(self) -> bool:
        """True if the journal is to be rewritten."""
        return self.place.size >= LONG_JOURNAL

    def write(self, record: Record) -> None:
        """Append what has changed. Raises StoreError; the journal is then as it was."""
        if record == self.stored:
            return
        tokens = _shared(self.stored.tokens, record.tokens)
        snapshot = self.snapshot if tokens >= self.snapshot else 0
        if self.place.whole:
            self.place.rewrite(_whole(record, snapshot))
        else:
            self.place.append(_line(_changes(record, tokens, _shared(self.stored.messages, record.messages))))
        self.stored, self.snapshot = record, snapshot

    def write_snapshot(self, session: Session) -> None:
        """Write the state after all tokens, if it is not in a file yet, and shorten a long journal. Raises StoreError, PoolClosedError."""
        count = len(self.stored.tokens)
        if not count or (self.snapshot == count and not self.long):
            return
        state = self._state(count)
        self.place.save(session, state)
        if self.long or self.place.whole:
            self.place.rewrite(_whole(self.stored, count))
        else:
            self.place.append(_line({"snapshot": count}))
        self.snapshot = count
        self.place.tidy(state)

    def restore(self, session: Session) -> int:
        """Load the newest state into a session. Returns the number of tokens that it has read; 0 if there is no such state."""
        if not self.snapshot:
            return 0
        try:
            self.place.load(session, self._state(self.snapshot))
        except ZooError:  # damaged or gone: the tokens are read again
            return 0
        return self.snapshot

    def check(self) -> bool:
        """Return whether the session is still ours. Raises StoreError if that cannot be read."""
        try:
            self.place.check()
        except TakenOverError:
            return False
        return True

    def delete(self) -> None:
        """Remove the session. Raises StoreError."""
        self.place.delete()

    def _state(self, count: int) -> str:
        return self.place.state(self.stored.tokens[:count])


class Store:
    """Sessions of one model, in a folder or in an object store.

    Args:
        where: a folder, or a URL that fsspec knows.
        identity: what identifies the model's config and weights, and how its streams sleep. Sessions with another are refused.
    Raises:
        ZooError: a folder or an object store that cannot be used.
    """

    def __init__(self, where: str | Path, identity: dict[str, str]) -> None:
        self.places, self.identity = places(where), identity

    def names(self, owner: str) -> list[str]:
        """Return the ids of all sessions of an owner. Raises StoreError, OSError."""
        return sorted(str(fields.get("name")) for fields in self.places.abouts() if fields.get("owner") == _digest(owner))

    def exists(self, owner: str, name: str) -> bool:
        """Return whether a session is stored. Raises StoreError, OSError."""
        return self.places.exists(_key(owner, name))

    def open(self, owner: str, name: str) -> Journal:
        """Take over a session, or create it. Raises StoreError."""
        place, about = self.places.place(_key(owner, name)), {"name": name, "owner": _digest(owner), **self.identity}
        for key, value in {**dict.fromkeys(about), **place.about(about)}.items():
            if about.get(key) != value:
                held, here = (repr(one) if one is not None else "the default" for one in (value, about.get(key)))
                raise OtherServerError(f"session: '{name}': it was stored with {key}: {held}; this server has {here}")
        journal = Journal(place)
        _replay(journal, place.take_over())
        return journal

    def check(self) -> None:
        """Write a file of the size of a small state, and remove it. Raises StoreError."""
        self.places.check()


def places(where: str | Path) -> Places:
    """Return the sessions in a folder, which is created, or at a URL. Raises ZooError: it cannot be used."""
    if not str(where):
        raise ZooError("store: ''; want a folder, or the URL of an object store")
    if "://" not in str(where):
        return Folders(Path(where))
    try:
        from zoo.serving.objects import Objects
    except ImportError:
        raise ZooError(f"store: {where}: needs pip install 'sleep-zoo[store]'") from None
    return Objects(str(where))


def _replay(journal: Journal, content: bytes) -> None:
    """Read the complete lines of a journal; a kill can truncate the last one. Raises StoreError if any other line is damaged."""
    record, lines = journal.stored, content.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        fields = _fields(line)
        if fields is None and (number < len(lines) or line.endswith(b"\n")):
            raise StoreError(f"store: {journal.place.name}: line {number} is damaged")
        if fields is None:
            break
        journal.place.size += len(line)
        if "snapshot" in fields:
            journal.snapshot = fields["snapshot"]
            continue
        record.tokens[fields["keep"] :] = fields["tokens"]
        record.messages[fields["keep_messages"] :] = fields["messages"]
        record.sleeps = tuple((position, loops) for position, loops in fields["sleeps"])
        record.pending = fields.get("pending", 0)
        journal.snapshot = journal.snapshot if fields["keep"] >= journal.snapshot else 0


def _changes(record: Record, tokens: int, messages: int) -> dict[str, Any]:
    """Return the fields of a line for a record that keeps this many tokens and messages of the one before."""
    return {
        "keep": tokens,
        "tokens": record.tokens[tokens:],
        "sleeps": record.sleeps,
        "keep_messages": messages,
        "messages": record.messages[messages:],
        "pending": record.pending,
    }


def _whole(record: Record, snapshot: int) -> bytes:
    """Return a journal of one record and its snapshot, if there is one."""
    return _line(_changes(record, 0, 0)) + (_line({"snapshot": snapshot}) if snapshot else b"")


def _line(fields: dict[str, Any]) -> bytes:
    content = json.dumps(fields, separators=(",", ":")).encode()
    return b"%08x %b\n" % (zlib.crc32(content), content)


def _fields(line: bytes) -> dict[str, Any] | None:
    """Return the fields of a line; None if it is not complete."""
    content = line[9:-1]
    whole = line.endswith(b"\n") and line[:8] == b"%08x" % zlib.crc32(content)
    return json.loads(content) if whole else None


def _shared(a: list[Any], b: list[Any]) -> int:
    """Return the number of entries at the start of both."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _key(owner: str, name: str) -> str:
    """Return the name of a session's place."""
    return _digest(f"{_digest(owner)} {name}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
