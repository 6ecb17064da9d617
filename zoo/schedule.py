"""When a session sleeps. A schedule is written as its name and what it takes: `full`, `interval(512)`, `idle(0.5)`, `manual`."""

from __future__ import annotations

import re

from zoo.errors import ZooError
from zoo.registry import Registry


class Schedule:
    """`full`: when the window is full and a further token comes, as trained. The base of every schedule."""

    pause: float | None = None
    """Seconds without a token after which a sleep starts in the background; None: it never does."""

    def due(self, window: int | None) -> int | None:
        """Tokens of a window after which the next one waits for a sleep; None: nobody sleeps unasked.

        Args:
            window: L, the tokens a window of the model holds; None: it never sleeps.
        Raises:
            ZooError: the schedule makes no sense with this window.
        """
        return window


class Interval(Schedule):
    """`interval(n)`: every n tokens."""

    def __init__(self, tokens: float) -> None:
        if tokens != int(tokens) or tokens < 1:
            raise ZooError(f"interval: {tokens} must be a number of tokens, at least 1")
        self.tokens = int(tokens)

    def due(self, window: int | None) -> int | None:
        if window is None or self.tokens > window:
            raise ZooError(f"interval: {self.tokens} tokens; the model's window holds {window or 'any number, and it never sleeps'}")
        return self.tokens


class Idle(Schedule):
    """`idle(seconds)`: in the background when no token has come for so long; else when the window is full.

    A token that comes while it sleeps goes first: what the sleep has done is thrown away.
    """

    def __init__(self, seconds: float) -> None:
        if not 0 <= seconds < float("inf"):
            raise ZooError(f"idle: {seconds} must be a number of seconds, at least 0")
        self.pause = seconds

    def due(self, window: int | None) -> int | None:
        if window is None:
            raise ZooError("idle: the model has no window, so it never sleeps")
        return window


class Manual(Schedule):
    """`manual`: only when told to. A token that no longer fits into the window is refused."""

    def due(self, window: int | None) -> int | None:
        return None


schedules: Registry[type[Schedule]] = Registry("schedule", "schedules")
schedules.register("full", Schedule)
schedules.register("interval", Interval)
schedules.register("idle", Idle)
schedules.register("manual", Manual)


def new_schedule(text: str) -> Schedule:
    """The schedule that `text` names, such as "interval(512)". Raises ZooError."""
    match = re.fullmatch(r"([\w-]+)(?:\(([^()]*)\))?", text.strip())
    if match is None:
        raise ZooError(f"schedule: '{text}'; want a name such as full, or a name and numbers such as interval(512)")
    kind = schedules.get(match[1])
    try:
        return kind(*(float(number) for number in match[2].split(",")) if match[2] else ())
    except ZooError:
        raise
    except (TypeError, ValueError):
        raise ZooError(f"schedule: '{text}'; {match[1]} takes {(kind.__doc__ or '').strip().partition(chr(10))[0]}") from None
