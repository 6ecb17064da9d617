"""Progress bars of training runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from zoo.train import Report


def new_progress() -> Progress:
    """A bar per run: steps, loss, accuracy, tokens per second, time left. Plain lines where there is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.1%}  {task.fields[speed]:,} tokens/s"),
        TimeRemainingColumn(),
    )


def add_run(progress: Progress, name: str, steps: int) -> TaskID:
    return progress.add_task(name, total=steps, loss=float("nan"), accuracy=0.0, speed=0)


def advance(progress: Progress, bar: TaskID, metrics: dict[str, Any]) -> None:
    progress.update(bar, completed=metrics["step"], loss=metrics["loss"], accuracy=metrics["accuracy"], speed=metrics["tokens_per_second"])


@contextmanager
def training_bar(steps: int, name: str) -> Iterator[Report]:
    """The `report` of one training run."""
    console = Console(stderr=True)
    if not console.is_terminal:
        line = "{name} step {step}/{steps} loss {loss:.3f} accuracy {accuracy:.3f} {tokens_per_second:,} tokens/s"
        yield lambda metrics: print(line.format(name=name, steps=steps, **metrics))
        return
    with new_progress() as progress:
        bar = add_run(progress, name, steps)
        yield lambda metrics: advance(progress, bar, metrics)
