"""Many streams through one model, whose tokens are read in one batch. The work is done in scheduler.py."""

from __future__ import annotations

from typing import Self

from torch import nn

from zoo.costs import window_bytes
from zoo.errors import ZooError, counted
from zoo.inputs import check_count, check_flag
from zoo.model import Model
from zoo.schedule import Schedule, new_schedule
from zoo.sessions.compiled import compiled_blocks
from zoo.sessions.host import BusyError as BusyError
from zoo.sessions.host import PoolClosedError as PoolClosedError
from zoo.sessions.host import PoolFullError as PoolFullError
from zoo.sessions.host import Stream
from zoo.sessions.rows import Rows
from zoo.sessions.scheduler import Scheduler
from zoo.sessions.session import Session
from zoo.sessions.sleeping_model import SleepingModel, check_model
from zoo.sessions.slots import Places, Slots, context_of
from zoo.sessions.snapshot import kept, size

SLOTS = 8  # by default


class SessionPool:
    """Sessions of one stream each that share a model and a thread.

    Every turn reads one token for each stream that waits for one, in one batch. Prompts and sleeps run in slices in between: after
    a batch for up to a quarter of its usual time, up to twice that time if streams wait for prompts or sleeps, and all the time if no
    stream waits for a token.

    Args:
        model: a `zoo.Model`, or the model of a bundle.
        slots: maximum number of streams in a batch, at most `streams`; more streams take turns. Default 8, or `streams` if that is less.
        streams: maximum number of open streams, default `slots`.
        when: the schedule of every stream. Under `interval(n)` with n below the window, streams continue to answer while they
            sleep.
        context: maximum number of tokens per stream, for a model that never sleeps.
        max_bytes: upper bound on `bytes`.
        compile: on a CPU, compile the blocks for one stream and for several, in the background, and use them as soon as they are
            ready. Needs a C++ compiler.
    Raises:
        ZooError: a bad argument; a model that cannot be compiled; slots and streams that may need more than `max_bytes`.
    """

    def __init__(
        self,
        model: Model | SleepingModel,
        slots: int | None = None,
        *,
        streams: int | None = None,
        when: str | Schedule = "full",
        context: int | None = None,
        max_bytes: int | None = None,
        compile: bool = False,
    ) -> None:
        check_model(model)
        check_flag("compile", compile)
        if compile:
            compiled_blocks(model)  # refuses what cannot be compiled
        for name, value in {"slots": slots, "streams": streams, "context": context, "max_bytes": max_bytes}.items():
            if value is not None:
                check_count(name, value)
        if slots is None:
            slots = SLOTS if streams is None else min(SLOTS, streams)
        streams = slots if streams is None else streams
        if slots > streams:
            raise ZooError(f"slots: {slots} are more than the {counted(streams, 'stream')}, each of which uses one at most")
        self.model, self.streams = model, streams
        self.schedule = new_schedule(when)
        self.schedule.due(model.config.window)
        self.context = context_of(model, context)
        self.bytes = _bytes(model, slots * (2 if compile else 1), streams, self.context)  # blocks are compiled on scratch states
        """Upper bound on the memory of all stream states, excluding activations."""
        if max_bytes is not None and self.bytes > max_bytes:
            asked = f"{counted(slots, 'slot')} and {counted(streams, 'stream')}"
            raise ZooError(f"max_bytes: {max_bytes}; {asked} of {model.config.name} may need {self.bytes}: allow fewer")
        places: Places[Stream]
        if isinstance(model, nn.Module):
            places = Slots(model, slots, self.context, compile=compile)
        else:
            in_place = model.slots(slots)
            places = Rows(model, slots) if in_place is None else in_place
        self._scheduler = Scheduler(places, streams, self.context)

    def open(self) -> Session:
        """Open a new stream: a `Session` that may be used from any thread, one call at a time. Raises PoolFullError, PoolClosedError.

        A call raises BusyError while another one of the same session is running.
        """
        return Session(self.model, when=self.schedule, host=self._scheduler)

    def __len__(self) -> int:
        """Number of open streams."""
        return len(self._scheduler)

    @property
    def sleeps(self) -> int:
        """Number of sleeps that have ended."""
        return self._scheduler.sleeps.ended

    @property
    def seconds_asleep(self) -> float:
        """Seconds from start to end of all sleeps that have ended."""
        return self._scheduler.sleeps.seconds

    @property
    def waiting(self) -> dict[str, int]:
        """Number of calls that wait: for a slice of their "prompt", for a "token" to be read, or for a "sleep"."""
        return self._scheduler.waiting

    def close(self) -> None:
        """Cancel all work and end the thread. Pending calls raise PoolClosedError."""
        self._scheduler.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _bytes(model: Model | SleepingModel, slots: int, streams: int, context: int) -> int:
    if not isinstance(model, nn.Module):  # its caches are rings of fixed size
        # the slots before and after a pass, and a copy of those that take part; per stream, states before, during and after a sleep
        return (3 * slots + 6 * streams) * (size(model.init_state()) + 4 * model.config.vocab_size)
    sleeps = model.config.window is not None
    fast = size(model.init_state().fast) + model.config.vocab_size * model.embed.weight.element_size()  # and the last logits
    awake = fast + window_bytes(model, context + 1)  # `Slots` has one more
    start = fast + window_bytes(model, kept(model.config, context) if sleeps else 0)
    # per stream: its waking state, the one being computed, and the window's start; and the same again for a sleep that ends
    return slots * awake + streams * (2 if sleeps else 1) * (2 * awake + start)
