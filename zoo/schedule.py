"""Schedules: when a session sleeps. One is written as a name with arguments: `full`, `interval(512)`, `idle(0.5)`, `manual`."""

from __future__ import annotations

import math
import re

from zoo.errors import ZooError, counted
from zoo.registry import Registry

LONGEST_WAIT = 1e9
"""Limit of every wait that a user chooses, in seconds; a thread cannot wait ten times as long."""

schedules: Registry[type[Schedule]] = Registry("schedule", "schedules")


@schedules.register("full")
class Schedule:
    """`full`: when the window is full and another token arrives, as in training. The base class of every schedule."""

    pause: float | None = None
    """Seconds without a token after which a sleep starts in the background; None: no background sleeps."""

    def due(self, window: int | None) -> int | None:
        """Return the number of tokens in the window after which the next token waits for a sleep; None: it never does.

        Args:
            window: L, the size of the model's window in tokens; None: the model never sleeps.
        Raises:
            ZooError: the schedule does not fit this window.
        """
        return window


@schedules.register("interval")
class Interval(Schedule):
    """`interval(n)`: every n tokens."""

    def __init__(self, tokens: float) -> None:
        if not (1 <= tokens < math.inf and tokens == int(tokens)):
            raise ZooError(f"interval: {tokens} must be a number of tokens, at least 1")
        self.tokens = int(tokens)

    def due(self, window: int | None) -> int | None:
        if window is None:
            raise ZooError(f"interval: {counted(self.tokens, 'token')}; the model has no window, so it never sleeps")
        if self.tokens > window:
            raise ZooError(f"interval: {counted(self.tokens, 'token')}; the model's window holds {window}")
        return self.tokens


@schedules.register("idle")
class Idle(Schedule):
    """`idle(seconds)`: in the background after this many seconds without a token, or when the window is full.

    A token that arrives during a background sleep cancels it.
    """

    def __init__(self, seconds: float) -> None:
        if not 0 <= seconds <= LONGEST_WAIT:
            raise ZooError(f"idle: {seconds} must be a number of seconds from 0 to {LONGEST_WAIT:.0e}")
        self.pause = seconds

    def due(self, window: int | None) -> int | None:
        if window is None:
            raise ZooError("idle: the model has no window, so it never sleeps")
        return window


@schedules.register("manual")
class Manual(Schedule):
    """`manual`: only when `Session.sleep` is called. A token that no longer fits into the window is refused."""

    def due(self, window: int | None) -> int | None:
        return None


def new_schedule(text: str | Schedule) -> Schedule:
    """Return a schedule, or the one written as `text`, such as "interval(512)". Raises ZooError."""
    if isinstance(text, Schedule):
        return text
    if not isinstance(text, str):
        raise ZooError(f"schedule: {text!r}; want a Schedule, or text such as 'full' or 'interval(512)'")
    match = re.fullmatch(r"([\w-]+)(?:\(([^()]*)\))?", text.strip())
    if match is None:
        raise ZooError(f"schedule: '{text}'; want a name such as full, or a name with numbers such as interval(512)")
    kind = schedules.get(match[1])
    try:
        return kind(*(float(number) for number in match[2].split(",")) if match[2] else ())
    except ZooError:
        raise
    except (TypeError, ValueError):
        raise ZooError(f"schedule: '{text}'; {match[1]} takes {(kind.__doc__ or '').strip().partition(chr(10))[0]}") from None
