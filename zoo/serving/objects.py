"""Sessions in an object store, which has no append and no locks, through fsspec.

Each line of a journal is an object, and a session is a prefix with these:

    session.json                    what identifies the session
    LEASE.lease                     of each process that has taken it over: a number and random digits; the largest is the owner's
    LEASE-N.jsonl                   the N-th line of an owner
    LEASE-N.whole.jsonl             one that does not depend on any before it, such as the first of each owner
    COUNT-DIGEST.safetensors        the state after COUNT tokens with this digest

No name of a lease or a line is ever used twice, so a write that is slow or is repeated replaces nothing.
The journal is the last whole line of the largest lease that has one, and the lines of the same lease after it.

An owner writes a line and lists the leases after that: if there is a larger one, the line does not count as written.
A process that takes the session over writes its lease and lists the lines after that.
So of every line, either the next owner sees it, or its writer sees the next owner, if a list shows all that was written before it.
Lines that arrive later are those of a smaller lease as soon as the new owner has written its first line, and are ignored from then on.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from zoo.checkpoints.plain import one_line
from zoo.errors import ZooError
from zoo.serving.places import ABOUT, StoreError, TakenOverError, failures, read_fields
from zoo.sessions.session import Session

LEASE, LINE, WHOLE = ".lease", ".jsonl", ".whole.jsonl"
OBJECT = 2**14  # bytes that a line counts for in addition to its own, since each takes a request to read


class ObjectPlace:
    """The prefix of one session."""

    def __init__(self, files: AbstractFileSystem, path: str) -> None:
        self._files, self.name = files, path
        self.size, self.whole = 0, True
        self._lease, self._number = "", 0
        """Our lease, and the number of lines that we have tried to write."""

    def about(self, new: dict[str, str]) -> dict[str, Any]:
        with failures(self.name, Exception):
            if not _journal(self._names()):
                self._write(ABOUT, json.dumps(new).encode())
            return read_fields(self._files.cat_file(f"{self.name}/{ABOUT}"), f"{self.name}/{ABOUT}")

    def take_over(self) -> bytes:
        with failures(self.name, Exception):
            number = int(_largest(self._names())[:12] or 0) + 1
            self._lease = f"{number:012d}-{secrets.token_hex(8)}"
            self._write(self._lease + LEASE, b"")
            return self._read(_journal(self._our_names()))

    def append(self, line: bytes) -> None:
        self._write_line(line, LINE)
        self.size += len(line) + OBJECT

    def rewrite(self, content: bytes) -> None:
        self._write_line(content, WHOLE)
        self.size = 0

    def state(self, tokens: list[int]) -> str:
        """Name a state after its tokens: a former owner that writes one late replaces it with the same."""
        return f"{len(tokens)}-{hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:32]}.safetensors"

    def save(self, session: Session, state: str) -> None:
        with failures(self.name, Exception), TemporaryDirectory() as folder:
            self._our_names()
            file = Path(folder) / state
            session.save(file)
            self._files.put_file(str(file), f"{self.name}/{state}")

    def load(self, session: Session, state: str) -> None:
        with failures(self.name, Exception), TemporaryDirectory() as folder:
            file = Path(folder) / state
            self._files.get_file(f"{self.name}/{state}", str(file))
            session.load(file)

    def tidy(self, state: str) -> None:
        with failures(self.name, Exception):
            names = self._our_names()
            self._remove(set(names) - {ABOUT, self._lease + LEASE, state, *_journal(names)})

    def check(self) -> None:
        with failures(self.name, Exception):
            self._our_names()

    def delete(self) -> None:
        with failures(self.name, Exception):
            names = self._our_names()
            for name in sorted(names):
                if name.endswith(WHOLE):  # one by one, so that no older journal comes back in between
                    self._remove({name})
            self._remove({name for name in names if not name.endswith(WHOLE)})

    def _names(self) -> list[str]:
        """Return the names of all objects."""
        try:
            return [str(path).rsplit("/", 1)[-1] for path in self._files.ls(self.name, detail=False)]
        except FileNotFoundError:
            return []

    def _our_names(self) -> list[str]:
        """Return the names of all objects. Raises TakenOverError if the session is not ours."""
        names = self._names()
        if ABOUT not in names or _largest(names) != self._lease:
            done = "taken over" if ABOUT in names else "deleted"
            raise TakenOverError(f"session: another process has {done} {self.name.rsplit('/', 1)[-1]}")
        return names

    def _read(self, lines: list[str]) -> bytes:
        if lines and int(lines[-1][30:42]) - int(lines[0][30:42]) != len(lines) - 1:
            raise StoreError(f"store: {self.name}: of the lines from {lines[0]} to {lines[-1]}, one is missing")
        found = self._files.cat([f"{self.name}/{name}" for name in lines]) if lines else {}
        return b"".join(found[f"{self.name}/{name}"] for name in lines)

    def _write(self, name: str, content: bytes) -> None:
        self._files.pipe_file(f"{self.name}/{name}", content)

    def _write_line(self, content: bytes, ending: str) -> None:
        self._number += 1
        self.whole = True  # a line that fails may arrive later, or never: the next one must not depend on it
        with failures(self.name, Exception):
            self._write(f"{self._lease}-{self._number:012d}{ending}", content)
            self._our_names()
        self.whole = False

    def _remove(self, names: set[str]) -> None:
        if names:
            self._files.rm([f"{self.name}/{name}" for name in names])


class Objects:
    """The prefix of all sessions."""

    def __init__(self, url: str) -> None:
        if url.startswith(("file:", "local:")):
            raise ZooError(f"store: {url}; want the folder without {url.partition(':')[0]}://, or the URL of an object store")
        try:
            self._files, path = url_to_fs(url, use_listings_cache=False)
        except Exception as error:  # an unknown protocol, a package that is missing, credentials: each has errors of its own
            raise ZooError(f"store: {url}: {one_line(error)}") from None
        self._path, self._url = path.rstrip("/"), url

    def abouts(self) -> Iterator[dict[str, Any]]:
        with failures(self._url, Exception):
            found = defaultdict[str, list[str]](list)
            for path in self._files.find(self._path):
                folder, name = path.rsplit("/", 1)
                found[folder].append(name)
            files = [f"{folder}/{ABOUT}" for folder, names in found.items() if ABOUT in names and _journal(names)]
            return iter([read_fields(content, file) for file, content in self._files.cat(files).items()] if files else [])

    def exists(self, name: str) -> bool:
        with failures(self._url, Exception):
            return bool(_journal(self.place(name)._names()))

    def place(self, name: str) -> ObjectPlace:
        return ObjectPlace(self._files, f"{self._path}/{name}")

    def check(self) -> None:
        path = f"{self._path}/.check.{secrets.token_hex(8)}"
        with failures(self._url, Exception):
            self._files.pipe_file(path, bytes(2**16))
            self._files.rm_file(path)


def _largest(names: list[str]) -> str:
    """Return the largest lease, or nothing."""
    return max((name.removesuffix(LEASE) for name in names if name.endswith(LEASE)), default="")


def _journal(names: list[str]) -> list[str]:
    """Return the names of the objects of the journal, in order. Lines without a lease are those of a deleted session."""
    leases = {name.removesuffix(LEASE) for name in names if name.endswith(LEASE)}
    lines = sorted(name for name in names if name.endswith(LINE) and name[:29] in leases)
    start = max((name for name in lines if name.endswith(WHOLE)), default="")
    return [name for name in lines if start and name >= start]
