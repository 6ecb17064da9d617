"""A pool of processes that train many runs at once, with a progress bar each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from rich.progress import Progress

from zoo.errors import ZooError
from zoo.signals import STOPPING, StoppedError, deferred
from zoo.system import cores
from zoo.training.config import Report, TrainConfig
from zoo.training.loop import train
from zoo.training.reporting import add_run, advance, new_progress
from zoo.training.run_folder import RESULTS, BusyError

Name = TypeVar("Name", bound=Hashable)
BUSY = "another process is training it; waiting"
LOOK_AGAIN = 5.0
"""Seconds after which a run that another process is training is tried again."""


class Job(NamedTuple):
    """One run to train. Of a finished one, only `after` is called."""

    config: TrainConfig
    folder: Path
    after: Callable[[Path], None] | None = None
    """Function called with the folder when the run is finished, in the same process; must be picklable."""


def train_all(jobs: Mapping[Name, Job], processes: int | None = None) -> dict[Name, str]:
    """Train every job, in order, in worker processes. Workers end with this process, however it ends.

    Several of these in the same folders share the jobs: each trains those that no other is training, and then waits for the rest.

    Args:
        jobs: by the name that its bar shows.
        processes: jobs at once, each with one thread or one GPU; default: one per GPU, or else per core.
    Returns:
        The jobs that failed, and why.
    Raises:
        StoppedError: after one of the signals of `zoo.signals`; runs in progress have written a checkpoint.
    """
    pending = dict.fromkeys(jobs, 0.0)  # with the time before which a job is not tried again
    slots = min(processes or torch.cuda.device_count() or cores(), len(pending))
    workers: dict[int, _Worker[Name]] = {}
    failed: dict[Name, str] = {}
    busy: set[Name] = set()
    with deferred() as stop_requested, new_progress() as progress:
        try:
            while not stop_requested() and (pending or any(worker.name is not None for worker in workers.values())):
                for slot in range(slots if pending else 0):
                    worker = workers.get(slot) or workers.setdefault(slot, _Worker(slot, progress))
                    due = (name for name, when in pending.items() if when <= time.monotonic())
                    if worker.name is None and (name := next(due, None)) is not None:
                        del pending[name]
                        worker.start(name, jobs[name])
                ready = wait([worker.connection for worker in workers.values()], timeout=0.2)
                for slot, worker in list(workers.items()):
                    if worker.connection in ready:
                        ended, outcome = worker.receive()
                        if ended is not None:
                            if not (outcome == BUSY and ended in busy):
                                progress.console.print(f"{ended}: {outcome or 'done'}", highlight=False)
                            if outcome == BUSY:
                                busy.add(ended)
                                pending[ended] = time.monotonic() + LOOK_AGAIN
                            elif outcome is not None:
                                failed[ended] = outcome
                        if not worker.process.is_alive():
                            del workers[slot]
        finally:
            for worker in workers.values():
                worker.process.terminate()
            for worker in workers.values():
                worker.process.join()
        if number := stop_requested():
            raise StoppedError("stopped; the same command resumes", number)
    return failed


class _Worker(Generic[Name]):
    """The parent's side of a worker process, which trains one job after another."""

    name: Name | None = None
    """The job in progress."""

    def __init__(self, slot: int, progress: Progress) -> None:
        context = multiprocessing.get_context("spawn")
        self.progress = progress
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, slot), daemon=True)
        # only SIGTERM, from the parent, stops a worker; Ctrl-C reaches the whole process group
        resource_tracker.ensure_running()  # if `start` had to start it, it would unblock SIGINT
        before = signal.pthread_sigmask(signal.SIG_BLOCK, set(STOPPING) - {signal.SIGTERM})
        self.process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def start(self, name: Name, job: Job) -> None:
        self.name = name
        self.bar = add_run(self.progress, str(name), job.config.steps)
        with suppress(BrokenPipeError):  # the process has ended; `receive` will report it
            self.connection.send(job)

    def receive(self) -> tuple[Name | None, str | None]:
        """Handle a message from the process. Returns the job that it ended, if any, and why it failed, if it did."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            message = f"its process ended with status {self.process.exitcode}"
        if isinstance(message, dict):
            advance(self.progress, self.bar, message)
            return None, None
        ended, self.name = self.name, None
        if ended is not None:
            self.progress.remove_task(self.bar)
        return ended, message


def _work(connection: Connection, slot: int) -> None:
    """Train the jobs that arrive. Sends metrics (a dict) as they come, and at the end of a job None or the error."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # between runs
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(slot % gpus)

    def send(message: dict[str, Any] | str | None) -> None:
        with suppress(BrokenPipeError):  # the parent has ended; SIGTERM is on its way
            connection.send(message)

    while True:
        try:
            while not connection.poll(0.2):  # handlers of signals that another thread receives run in between
                pass
            job: Job = connection.recv()
        except (EOFError, ConnectionResetError):  # the parent has ended
            return
        try:
            send(finish(job, send))
        except StoppedError:
            return


def finish(job: Job, report: Report = lambda metrics: None) -> str | None:
    """Do a job in this process. Returns why it failed, if it did, or `BUSY`. Raises StoppedError, as `train`."""
    try:
        try:
            if not (job.folder / RESULTS).exists():
                train(job.config, job.folder, report=report)
        except ZooError:
            if not (job.folder / RESULTS).exists():  # otherwise another process has just finished it
                raise
        if job.after is not None:
            job.after(job.folder)
    except BusyError:
        return BUSY
    except ZooError as error:
        return str(error)
    return None


def _end_with_parent() -> None:
    """Send this process SIGTERM, on which a run saves itself, as soon as its parent has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
