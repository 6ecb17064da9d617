"""The parts of the standard library that differ between operating systems."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from contextlib import suppress
from functools import cache
from typing import IO, Any


def _optional(name: str) -> Any:
    """Return a module of the standard library; None on a system without it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


fcntl, resource = _optional("fcntl"), _optional("resource")  # Unix
msvcrt = _optional("msvcrt")  # Windows
ARENA_MAX = -8  # M_ARENA_MAX of glibc's malloc.h
BEYOND = 2**30  # offset of the locked byte on Windows, where a locked byte cannot be read


def cores() -> int:
    """Return the number of cores that this process may use, as far as the system reports it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_resident() -> int | None:
    """Return the peak resident memory of this process in bytes; None if the system does not report it."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def share_heaps() -> None:
    """Let all threads allocate from two heaps, if the C library is glibc: with a heap per thread, more freed memory stays unused.

    Call it before threads are started.
    """
    with suppress(AttributeError, OSError, TypeError):
        _libc().mallopt(ARENA_MAX, 2)


def release_freed() -> None:
    """Return the memory of freed objects to the system, if the C library is glibc, which keeps it otherwise."""
    with suppress(AttributeError, OSError, TypeError):
        _libc().malloc_trim(0)


def lock(file: IO[Any]) -> bool:
    """Lock an open file until it is closed. Returns False if another process holds the lock."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt is not None:
            os.lseek(file.fileno(), BEYOND, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    return True
