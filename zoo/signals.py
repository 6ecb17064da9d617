"""Signals that stop a command: SIGINT (Ctrl-C), SIGTERM, and SIGUSR1 and SIGUSR2, which batch systems send before a time limit."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
before_exit: list[Callable[[], None]] = []
"""Functions to call before a signal ends the process at once."""
IMPATIENCE = 2.0
"""Seconds after which another Ctrl-C counts as a second one: torchrun forwards the one that its processes already got from the terminal."""


class StoppedError(Exception):
    """A run was stopped by a signal and has been saved; the same command resumes it."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number
        """Exit status of a command that was stopped."""


def exit_on_signals() -> None:
    """Make every signal from now on end the process at once, with status 128 + its number and without unfinished files."""
    # a process of torchrun may be waiting for another one in C++, where no Python handler runs
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    for number in STOPPING:
        signal.signal(number, _exit if alone else signal.SIG_DFL)


def restore_defaults() -> None:
    """Let the system end the process on a signal: no Python handler runs while the interpreter shuts down."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def interruptible() -> Iterator[None]:
    """Make Ctrl-C raise KeyboardInterrupt inside the block, as Python does by default."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """Defer signals inside the block. The yielded function returns the number of the first that has arrived, or 0.

    After the block, a signal that the function has not reported is raised again. A second Ctrl-C ends the process at once. Outside the main
    thread, which receives the signals, nothing is deferred.
    """
    arrived, since, seen = 0, 0.0, False

    def note(number: int, frame: Any) -> None:
        nonlocal arrived, since
        if not arrived:
            arrived, since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - since > IMPATIENCE:
            _exit(number, frame)

    def requested() -> int:
        nonlocal seen
        seen = bool(arrived)
        return arrived

    main = threading.current_thread() is threading.main_thread()
    # a handler that was not set from Python is None, and could not be set again
    ours = [number for number in STOPPING if signal.getsignal(number) is not None] if main else []
    before = {number: signal.signal(number, note) for number in ours}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if arrived and not seen:
        signal.raise_signal(arrived)


def _exit(number: int, frame: Any) -> None:
    for clean in before_exit:
        clean()
    os._exit(128 + number)
