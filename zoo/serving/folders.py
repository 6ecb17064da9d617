"""Sessions in a folder: for each a journal to which lines are appended, states, and a lease, a counter under a lock."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from zoo.checkpoints.plain import one_line
from zoo.files import replacing
from zoo.serving.places import ABOUT, StoreError, TakenOverError, failures, read_fields
from zoo.sessions.session import Session
from zoo.system import lock

JOURNAL, LEASE = "journal.jsonl", "lease"


class FolderPlace:
    """The folder of one session. Each line of its journal is synced before a request ends."""

    whole = False

    def __init__(self, folder: Path) -> None:
        self.folder, self._journal = folder, folder / JOURNAL
        self.name, self.size = str(self._journal), 0
        self._lease = 0
        """Our number in the lease; a larger one there means that another process has taken the session over."""

    def about(self, new: dict[str, str]) -> dict[str, Any]:
        with failures(self.folder, OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not _has_content(self.folder):  # a session whose first request was refused has an empty one
                with replacing(self.folder / ABOUT) as scratch, scratch.open("wb", buffering=0) as file:
                    _write_synced(file, json.dumps(new).encode())
                self._journal.touch()
                _sync(self.folder)
                _sync(self.folder.parent)
            return _read_about(self.folder)

    def take_over(self) -> bytes:
        with failures(self.folder, OSError):
            with _locked(self.folder / LEASE) as file:
                self._lease = (_number(file) or time.time_ns()) + 1  # larger than any of a deleted session of this name
                file.seek(0)
                _write_synced(file, b"%020d" % self._lease)  # in place: needs no room, and can only become larger
            return self._journal.read_bytes()

    def append(self, line: bytes) -> None:
        with self._ours(), self._journal.open("r+b", buffering=0) as file:
            file.seek(self.size)
            file.truncate()  # what a kill left of a line
            try:
                _write_synced(file, line)
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(self.size)
                raise
            self.size += len(line)

    def rewrite(self, content: bytes) -> None:
        with self._ours():
            with replacing(self._journal) as scratch, scratch.open("wb", buffering=0) as file:
                _write_synced(file, content)
            self.size = len(content)

    def state(self, tokens: list[int]) -> str:
        return f"{len(tokens)}.safetensors"

    def save(self, session: Session, state: str) -> None:
        with self._ours():
            session.save(self.folder / state)

    def load(self, session: Session, state: str) -> None:
        with failures(self.folder, OSError):
            session.load(self.folder / state)

    def tidy(self, state: str) -> None:
        with self._ours():
            for old in self.folder.iterdir():
                if old.name not in (ABOUT, JOURNAL, LEASE, state):
                    old.unlink(missing_ok=True)

    def check(self) -> None:
        with self._ours():
            pass

    def delete(self) -> None:
        with self._ours():
            shutil.rmtree(self.folder)

    @contextlib.contextmanager
    def _ours(self) -> Iterator[None]:
        """Hold the session's lock. Raises StoreError if another process has taken it over, or if the store fails."""
        with failures(self.folder, OSError):
            try:
                with _locked(self.folder / LEASE) as file:
                    if _number(file) != self._lease:
                        raise TakenOverError(f"session: another process has taken over {self.folder.name}")
                    yield
            except FileNotFoundError:
                raise TakenOverError(f"session: another process has deleted {self.folder.name}") from None


class Folders:
    """A folder with a subfolder for each session, created if there is none. Raises StoreError: it cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with failures(folder, OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise StoreError(f"store: {folder}: cannot be written to")

    def abouts(self) -> Iterator[dict[str, Any]]:
        return (_read_about(file.parent) for file in self.folder.glob(f"*/{ABOUT}") if _has_content(file.parent))

    def exists(self, name: str) -> bool:
        return _has_content(self.folder / name)

    def place(self, name: str) -> FolderPlace:
        return FolderPlace(self.folder / name)

    def check(self) -> None:
        scratch = self.folder / f".check.{os.getpid()}"
        with failures(self.folder, OSError):
            try:
                with scratch.open("wb", buffering=0) as file:
                    _write_synced(file, bytes(2**16))
            finally:
                scratch.unlink(missing_ok=True)


def _read_about(folder: Path) -> dict[str, Any]:
    file = folder / ABOUT
    try:
        content = file.read_bytes()
    except OSError as error:
        raise StoreError(f"store: {file}: cannot be read: {one_line(error)}") from None
    return read_fields(content, file)


def _has_content(folder: Path) -> bool:
    journal = folder / JOURNAL
    return journal.is_file() and journal.stat().st_size > 0


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
