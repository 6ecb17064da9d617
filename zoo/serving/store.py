"""Sessions in a folder, kept after the process ends: a journal of tokens for each, snapshots of its state, and a lease."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from zoo.checkpoints.plain import one_line
from zoo.errors import ZooError
from zoo.files import replacing
from zoo.serving.prefixes import Sleeps
from zoo.sessions.pool import PoolClosedError
from zoo.sessions.session import Session
from zoo.system import lock

ABOUT, JOURNAL, LEASE = "session.json", "journal.jsonl", "lease"
LONG_JOURNAL = 2**20  # bytes after which a journal is rewritten


class StoreError(ZooError):
    """A session cannot be written to the store, or read back."""


class TakenOverError(StoreError):
    """Another process owns the session now."""


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
    """The files of one session: each line of the journal holds what has changed, and is synced before a request ends.

    A line is valid only if it is complete: its first field is a checksum of the rest.
    """

    folder: Path
    lease: int
    """Our number in the lease; a larger one there means that another process has taken the session over."""
    size: int = 0
    """Bytes of complete lines."""
    stored: Record = field(default_factory=Record)
    """The session as recorded in the journal."""
    snapshot: int = 0
    """Number of tokens after which the state is in a file; 0: there is none."""

    def write(self, record: Record) -> None:
        """Append what has changed. Raises StoreError; the journal is then as it was."""
        tokens, messages = _shared(self.stored.tokens, record.tokens), _shared(self.stored.messages, record.messages)
        changed = {
            "keep": tokens,
            "tokens": record.tokens[tokens:],
            "sleeps": record.sleeps,
            "keep_messages": messages,
            "messages": record.messages[messages:],
            "pending": record.pending,
        }
        if record != self.stored:
            self._append(changed)
            self.snapshot = self.snapshot if tokens >= self.snapshot else 0
            self.stored = record

    def write_snapshot(self, session: Session) -> None:
        """Write the state after all tokens, if it is not in a file yet, and shorten a long journal. Raises StoreError, PoolClosedError."""
        count = len(self.stored.tokens)
        if not count or (self.snapshot == count and self.size < LONG_JOURNAL):
            return
        with self._ours():
            session.save(self.folder / f"{count}.safetensors")
            if self.size >= LONG_JOURNAL:
                whole = {"keep": 0, "tokens": self.stored.tokens, "sleeps": self.stored.sleeps, "keep_messages": 0}
                whole |= {"messages": self.stored.messages, "pending": self.stored.pending}
                content = _line(whole) + _line({"snapshot": count})
                with replacing(self.folder / JOURNAL) as scratch, scratch.open("wb", buffering=0) as file:
                    _write_synced(file, content)
                self.size = len(content)
        if self.snapshot != count:
            self._append({"snapshot": count})
        self.snapshot = count
        with self._ours():
            for old in self.folder.iterdir():  # older snapshots, and what a killed process left
                if old.name not in (ABOUT, JOURNAL, LEASE, f"{count}.safetensors"):
                    old.unlink(missing_ok=True)

    def restore(self, session: Session) -> int:
        """Load the newest state into a session. Returns the number of tokens that it has read; 0 if there is no such state."""
        if not self.snapshot:
            return 0
        try:
            session.load(self.folder / f"{self.snapshot}.safetensors")
        except ZooError:  # damaged or gone: the tokens are read again
            return 0
        return self.snapshot

    def check(self) -> bool:
        """Return whether the session is still ours. Raises StoreError if that cannot be read."""
        try:
            with self._ours():
                return True
        except TakenOverError:
            return False

    def delete(self) -> None:
        """Remove the session. Raises StoreError."""
        with self._ours():
            shutil.rmtree(self.folder)

    def _append(self, fields: dict[str, Any]) -> None:
        with self._ours(), (self.folder / JOURNAL).open("r+b", buffering=0) as file:
            line = _line(fields)
            file.seek(self.size)
            file.truncate()  # what a kill left of a line
            try:
                _write_synced(file, line)
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(self.size)
                raise
            self.size += len(line)

    @contextlib.contextmanager
    def _ours(self) -> Iterator[None]:
        """Hold the session's lock. Raises StoreError if another process has taken it over, or if the store fails."""
        try:
            with _locked(self.folder / LEASE) as file:
                if _number(file) != self.lease:
                    raise TakenOverError(f"session: another process has taken over {self.folder.name}")
                yield
        except FileNotFoundError:
            raise TakenOverError(f"session: another process has deleted {self.folder.name}") from None
        except OSError as error:
            raise StoreError(f"store: {self.folder}: {error.strerror or error}") from error
        except (StoreError, PoolClosedError):
            raise
        except ZooError as error:
            raise StoreError(f"store: {error}") from error


class Store:
    """A folder of sessions, all of one model.

    Args:
        identity: what identifies the model's config and weights, and how its streams sleep. Sessions with another are refused.
    """

    def __init__(self, folder: Path, identity: dict[str, str]) -> None:
        self.folder, self.identity = folder, identity

    def names(self, owner: str) -> list[str]:
        """Return the ids of all sessions of an owner. Raises StoreError, OSError."""
        found = [_read_json(file) for file in self.folder.glob(f"*/{ABOUT}") if _has_content(file.with_name(JOURNAL))]
        return sorted(str(fields.get("name")) for fields in found if fields.get("owner") == _digest(owner))

    def exists(self, owner: str, name: str) -> bool:
        """Return whether a session is stored. Raises OSError."""
        return _has_content(self._place(owner, name) / JOURNAL)

    def open(self, owner: str, name: str) -> Journal:
        """Take over a session, or create it. Raises StoreError."""
        folder = self._place(owner, name)
        about = {"name": name, "owner": _digest(owner), **self.identity}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / JOURNAL).exists():
                with replacing(folder / ABOUT) as scratch, scratch.open("wb", buffering=0) as file:
                    _write_synced(file, json.dumps(about).encode())
                (folder / JOURNAL).touch()
                _sync(folder)
                _sync(self.folder)
            for key, value in {**dict.fromkeys(about), **_read_json(folder / ABOUT)}.items():
                if about.get(key) != value:
                    held, here = (repr(one) if one is not None else "the default" for one in (value, about.get(key)))
                    raise OtherServerError(f"session: '{name}': it was stored with {key}: {held}; this server has {here}")
            with _locked(folder / LEASE) as file:
                lease = _number(file) + 1
                file.seek(0)
                _write_synced(file, b"%020d" % lease)  # in place: needs no room, and can only become larger
            journal = Journal(folder, lease)
            _replay(journal)
        except (OSError, ZooError) as error:
            raise error if isinstance(error, StoreError) else StoreError(f"store: {folder}: {error}") from error
        return journal

    def check(self) -> None:
        """Write a file of the size of a small state, and remove it. Raises StoreError."""
        scratch = self.folder / f".check.{os.getpid()}"
        try:
            with scratch.open("wb", buffering=0) as file:
                _write_synced(file, bytes(2**16))
        except OSError as error:
            raise StoreError(f"store: {self.folder}: {error.strerror}") from error
        finally:
            scratch.unlink(missing_ok=True)

    def _place(self, owner: str, name: str) -> Path:
        return self.folder / _digest(f"{_digest(owner)} {name}")


def _replay(journal: Journal) -> None:
    """Read the complete lines of a journal; a kill can truncate the last one. Raises StoreError if any other line is damaged."""
    record, file = journal.stored, journal.folder / JOURNAL
    lines = file.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        fields = _fields(line)
        if fields is None and (number < len(lines) or line.endswith(b"\n")):
            raise StoreError(f"store: {file}: line {number} is damaged")
        if fields is None:
            break
        journal.size += len(line)
        if "snapshot" in fields:
            journal.snapshot = fields["snapshot"]
            continue
        record.tokens[fields["keep"] :] = fields["tokens"]
        record.messages[fields["keep_messages"] :] = fields["messages"]
        record.sleeps = tuple((position, loops) for position, loops in fields["sleeps"])
        record.pending = fields.get("pending", 0)
        journal.snapshot = journal.snapshot if fields["keep"] >= journal.snapshot else 0


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


def _write_synced(file: FileIO, content: bytes) -> None:
    """Write all of `content` to an unbuffered file: a buffer would write its rest later, when there is room again."""
    while content:
        content = content[file.write(content) :]
    os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[FileIO]:
    """Open a file that no other process has locked, and that need not exist."""
    with open(path, "r+b", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666)) as file:
        while not lock(file):
            time.sleep(0.001)
        yield file


def _number(lease: FileIO) -> int:
    """Read the number in a lease. Raises StoreError."""
    try:
        return int(lease.read() or 0)
    except ValueError as error:
        raise StoreError(f"store: {lease.name}: damaged: {one_line(error)}") from None


def _sync(folder: Path) -> None:
    """Sync a folder, so that the names in it are durable."""
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        place = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"store: {file}: cannot be read: {one_line(error)}") from None
    return fields if isinstance(fields, dict) else {}


def _has_content(journal: Path) -> bool:
    """Return whether a session was stored, not only opened before the process was killed. Raises OSError."""
    return journal.is_file() and journal.stat().st_size > 0


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
