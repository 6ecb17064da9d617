"""A disk that is full or damaged, beneath every file that is opened in a folder; and what the files of a store hold."""

import builtins
import contextlib
import errno
import io
import json
import os
import time
import zlib
from pathlib import Path

from safetensors.torch import load_file


class Disk:
    """Files in a folder behave as if on a disk of their own.

    A write that does not fit is cut short, and the next one raises ENOSPC, as the system does it; bytes in place are written again.
    """

    def __init__(self, folder, monkeypatch):
        self.folder, self._open, self._fsync, self._stat = str(folder), io.open, os.fsync, os.stat
        self.heal()
        for module in (builtins, io):
            monkeypatch.setattr(module, "open", self._opened)
        monkeypatch.setattr(os, "fsync", self._synced)
        monkeypatch.setattr(os, "stat", self._looked_at)

    def heal(self):
        self.size, self.syncs, self.unreadable = None, None, None

    def fill(self, room):
        """Leave this many bytes."""
        self.size = self.used() + room

    def fail_after(self, syncs):
        """Let this many calls of fsync succeed."""
        self.syncs = syncs

    def used(self):
        total = 0
        for path, _, files in os.walk(self.folder):
            for file in files:
                with contextlib.suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(path, file)).st_size
        return total

    def _opened(self, path, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(self.folder):
            return self._open(path, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _File(self, os.fspath(path), mode.replace("b", "").replace("t", ""), opener=opener)
        if not buffering:
            return raw
        kind = io.BufferedRandom if raw.readable() and raw.writable() else io.BufferedReader if raw.readable() else io.BufferedWriter
        return kind(raw) if "b" in mode else io.TextIOWrapper(kind(raw), encoding, errors, newline)

    def _synced(self, file):
        if self.syncs is not None:
            self.syncs -= 1
            if self.syncs < 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._fsync(file)

    def _looked_at(self, path, **how):
        self.check_readable(path)
        return self._stat(path, **how)

    def check_readable(self, path):
        if self.unreadable is not None and str(path) == str(self.unreadable):
            raise OSError(errno.EIO, os.strerror(errno.EIO))


class _File(io.FileIO):
    def __init__(self, disk, path, mode, opener):
        super().__init__(path, mode, opener=opener)
        self._disk = disk

    def write(self, content):
        if self._disk.size is not None and len(content):
            end = self.tell() + len(content)
            missing = end - os.fstat(self.fileno()).st_size - max(0, self._disk.size - self._disk.used())
            content = content[: len(content) - max(0, missing)] if missing < len(content) else b""
            if not len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(content)

    def readinto(self, buffer):
        self._disk.check_readable(self.name)
        return super().readinto(buffer)

    def read(self, size=-1):
        self._disk.check_readable(self.name)
        return super().read(size)

    def readall(self):
        self._disk.check_readable(self.name)
        return super().readall()


def wait_until(happened):
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def recovers(server):
    """Wait until the server is ready, without a request to a session."""
    wait_until(lambda: server.ask("/ready")[0] == 200)


def stored(folder):
    """Tokens of each session in a store, by its id. Fails if a file is torn; only the last line of a journal may be cut."""
    found = {}
    for file in Path(folder).glob("*/session.json"):
        name = json.loads(file.read_text())["name"]
        if (lease := file.with_name("lease")).exists():
            assert int(lease.read_text() or 0) >= 0
        for snapshot in file.parent.glob("*.safetensors"):
            load_file(snapshot)
        journal = file.with_name("journal.jsonl")
        tokens = found[name] = []
        for line in journal.read_bytes().splitlines(keepends=True) if journal.exists() else ():
            if not line.endswith(b"\n"):
                break  # the last
            fields = complete(line)
            if "tokens" in fields:
                tokens[fields["keep"] :] = fields["tokens"]
    return found


def complete(line):
    """The fields of a line of a journal. Fails if it is torn."""
    checksum, content = line.removesuffix(b"\n").split(b" ", 1)
    assert (line[-1:], int(checksum, 16)) == (b"\n", zlib.crc32(content))
    return json.loads(content)
