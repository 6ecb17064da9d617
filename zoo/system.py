"""The parts of the standard library that differ between operating systems."""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
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


@cache
def _gomp() -> ctypes.CDLL | None:
    """Return torch's OpenMP library, if it is GNU's."""
    import torch

    file = next(Path(torch.__file__).parent.glob("lib/libgomp*"), None)
    return None if file is None else ctypes.CDLL(str(file))


def release_threads() -> None:
    """End the OpenMP threads that wait for the calling thread, if the library is GNU's; its next parallel operation starts new ones.

    Every thread that runs parallel operations has threads of its own. Once there are more than CPUs, none waits actively for the next
    operation any more, and a token takes up to half as long again.
    """
    with suppress(AttributeError, OSError):
        if (gomp := _gomp()) is not None:
            gomp.omp_pause_resource_all(1)  # omp_pause_soft


def lock(file: IO[Any]) -> bool:
    """Lock an open file until it is closed. Returns False if another process holds the lock. Raises OSError: the disk has no locks."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt is not None:
            os.lseek(file.fileno(), BEYOND, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise
        return False
    return True
