"""Destinations of metrics besides metrics.jsonl: progress bars, TensorBoard, trackers.

A sink takes the config and the folder of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from zoo.training.config import Report, TrainConfig
from zoo.training.parallel import is_main_process
from zoo.training.trackers import Tracker, flat, reporting_to

Sink = Callable[[TrainConfig, Path], AbstractContextManager[Report]]


@contextmanager
def all_sinks(config: TrainConfig, folder: Path, trackers: Sequence[Tracker] = ()) -> Iterator[Report]:
    """Report to the progress bar, to TensorBoard if installed, and to the trackers."""
    sinks: list[Sink] = [progress_bar, tensorboard, *(partial(reporting_to, tracker) for tracker in trackers)]
    with ExitStack() as stack:
        reports = [stack.enter_context(sink(config, folder)) for sink in sinks]

        def report(metrics: dict[str, Any]) -> None:
            for one in reports:
                one(metrics)

        yield report


@contextmanager
def progress_bar(config: TrainConfig, folder: Path) -> Iterator[Report]:
    """A bar on a terminal, printed lines elsewhere; on rank 0 only."""
    if not is_main_process():
        yield lambda metrics: None
        return
    done = max((int(checkpoint.name) for checkpoint in folder.glob("checkpoints/[0-9]*")), default=0)
    if not Console(stderr=True).is_terminal:
        if 0 < done < config.steps:
            print(f"{folder}: resumes after step {done} of {config.steps}", flush=True)
        yield lambda metrics: print(_line(config.model, config.steps, metrics), flush=True)
        return
    with new_progress() as progress:
        bar = add_run(progress, config.model, config.steps, done)
        yield lambda metrics: advance(progress, bar, metrics)


@contextmanager
def tensorboard(config: TrainConfig, folder: Path) -> Iterator[Report]:
    """Event files in `folder`/tensorboard, if TensorBoard is installed; a resumed run drops the steps it repeats."""
    writer: Any = None

    def write(metrics: dict[str, Any]) -> None:
        nonlocal writer
        if writer is None:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"), purge_step=metrics["step"])
        for name, value in flat(metrics).items():
            writer.add_scalar(name, value, metrics["step"])

    try:
        yield write if find_spec("tensorboard") else lambda metrics: None
    finally:
        if writer is not None:
            writer.close()


def new_progress() -> Progress:
    """Progress bars of training runs. Levels of accuracy are shown from the easiest to the hardest, model FLOPs utilisation
    where it is known."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[quality]}"),
        TextColumn("{task.fields[speed]}{task.fields[mfu]} {task.fields[memory]}"),
        console=Console(stderr=True),
    )


def add_run(progress: Progress, name: str, steps: int, done: int = 0) -> TaskID:
    """Add the bar of a run that resumes after step `done` and has no metrics yet."""
    return progress.add_task(name, total=steps, completed=done, quality="resuming" if done else "starting", speed="", mfu="", memory="")


def advance(progress: Progress, bar: TaskID, metrics: dict[str, Any]) -> None:
    """Show a line of metrics on the bar of its run."""
    progress.update(
        bar,
        completed=metrics["step"],
        quality=f"loss {metrics['loss']:.3f}  right {metrics['accuracy']:.1%}{_by_level(metrics)}",
        speed=f"{metrics['tokens_per_second']:,} tokens/s",
        mfu=_mfu(metrics),
        memory=_memory(metrics),
    )


def _line(name: str, steps: int, metrics: dict[str, Any]) -> str:
    return (
        f"{name} step {metrics['step']}/{steps} loss {metrics['loss']:.3f} accuracy {metrics['accuracy']:.3f}{_by_level(metrics)} "
        f"{metrics['tokens_per_second']:,} tokens/s{_mfu(metrics)}{_memory(metrics)}, {_time_left(metrics, steps)} left"
    )


def _by_level(metrics: dict[str, Any]) -> str:
    """Format the accuracy at each level, if there are few."""
    shares = list(metrics["by_level"].values())
    return f" ({' '.join(f'{share:.0%}' for share in shares)})" if 1 < len(shares) <= 8 else ""


def _mfu(metrics: dict[str, Any]) -> str:
    return f"  MFU {metrics['mfu']:.1%}" if "mfu" in metrics else ""


def _memory(metrics: dict[str, Any]) -> str:
    return f" {metrics['memory'] / 2**30:.1f} GiB" if "memory" in metrics else ""


def _time_left(metrics: dict[str, Any], steps: int) -> timedelta:
    """Estimate the time left at the current speed."""
    tokens = metrics["tokens"] * (steps / metrics["step"] - 1)
    return timedelta(seconds=round(tokens / max(1, metrics["tokens_per_second"])))
