"""Progress bars of training runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from zoo.training.config import Report
from zoo.training.parallel import is_main_process


def new_progress() -> Progress:
    """A bar per run: steps, loss, accuracy (also from the easiest to the hardest level), tokens per second, model FLOPs
    utilisation where it is known, memory, time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  right {task.fields[accuracy]:.1%}{task.fields[levels]}"),
        TextColumn("{task.fields[speed]:,} tokens/s{task.fields[mfu]}  {task.fields[memory]:.1f} GiB"),
        TimeRemainingColumn(),
    )


def add_run(progress: Progress, name: str, steps: int) -> TaskID:
    return progress.add_task(name, total=steps, loss=float("nan"), accuracy=0.0, levels="", speed=0, mfu="", memory=0.0)


def advance(progress: Progress, bar: TaskID, metrics: dict[str, Any]) -> None:
    progress.update(
        bar,
        completed=metrics["step"],
        loss=metrics["loss"],
        accuracy=metrics["accuracy"],
        levels=_by_level(metrics),
        speed=metrics["tokens_per_second"],
        mfu=_mfu(metrics),
        memory=metrics["memory"] / 2**30,
    )


def _mfu(metrics: dict[str, Any]) -> str:
    return f"  MFU {metrics['mfu']:.1%}" if "mfu" in metrics else ""


def _time_left(metrics: dict[str, Any], steps: int) -> timedelta:
    """At the speed of the last steps."""
    tokens = metrics["tokens"] * (steps / metrics["step"] - 1)
    return timedelta(seconds=round(tokens / max(1, metrics["tokens_per_second"])))


def _by_level(metrics: dict[str, Any]) -> str:
    """Percent right at each level, where there are a few."""
    shares = list(metrics["by_level"].values())
    return f" ({' '.join(f'{share:.0%}' for share in shares)})" if 1 < len(shares) <= 8 else ""


def _line(name: str, steps: int, metrics: dict[str, Any]) -> str:
    return (
        f"{name} step {metrics['step']}/{steps} loss {metrics['loss']:.3f} accuracy {metrics['accuracy']:.3f}{_by_level(metrics)} "
        f"{metrics['tokens_per_second']:,} tokens/s{_mfu(metrics)} {metrics['memory'] / 2**30:.1f} GiB, {_time_left(metrics, steps)} left"
    )


@contextmanager
def training_bar(steps: int, name: str) -> Iterator[Report]:
    """The `report` of one training run."""
    if not is_main_process():
        yield lambda metrics: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda metrics: print(_line(name, steps, metrics), flush=True)
        return
    with new_progress() as progress:
        bar = add_run(progress, name, steps)
        yield lambda metrics: advance(progress, bar, metrics)
