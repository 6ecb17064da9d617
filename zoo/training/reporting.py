"""Destinations of metrics besides metrics.jsonl: progress bars, TensorBoard, Weights & Biases.

A sink takes the config and the folder of a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from zoo.errors import ZooError
from zoo.training.config import Report, TrainConfig
from zoo.training.parallel import is_main_process

Sink = Callable[[TrainConfig, Path], AbstractContextManager[Report]]


@contextmanager
def all_sinks(config: TrainConfig, folder: Path, wandb: str | None = None) -> Iterator[Report]:
    """Report to the progress bar, to TensorBoard if installed, and to the Weights & Biases project `wandb` if given.

    Raises:
        ZooError: `wandb` is given, but the package is not installed.
    """
    sinks: list[Sink] = [progress_bar, tensorboard]
    if wandb is not None:
        sinks.append(partial(weights_and_biases, project=wandb))
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
    if not Console(stderr=True).is_terminal:
        yield lambda metrics: print(_line(config.model, config.steps, metrics), flush=True)
        return
    with new_progress() as progress:
        bar = add_run(progress, config.model, config.steps)
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
        for name, value in _flat(metrics).items():
            writer.add_scalar(name, value, metrics["step"])

    try:
        yield write if find_spec("tensorboard") else lambda metrics: None
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def weights_and_biases(config: TrainConfig, folder: Path, project: str) -> Iterator[Report]:
    """A run of the Weights & Biases project, named like the folder; a resumed run continues it. Raises ZooError."""
    try:
        import wandb
    except ImportError:
        raise ZooError(f"--wandb: {project}: needs pip install 'sleep-zoo[wandb]'") from None
    run: Any = None

    def write(metrics: dict[str, Any]) -> None:
        nonlocal run
        if run is None:
            run = wandb.init(
                project=project,
                name=folder.name,
                id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
                resume="allow",
                dir=str(folder),
                config=config.model_dump(mode="json"),
            )
        run.log(_flat(metrics), step=metrics["step"])

    try:
        yield write
    finally:
        if run is not None:
            run.finish()


def _flat(metrics: dict[str, Any]) -> dict[str, float]:
    """Return metrics by name, those by level as `by_level/3`."""
    flat = {f"by_level/{level}": share for level, share in metrics["by_level"].items()}
    return {**{name: value for name, value in metrics.items() if name not in ("step", "by_level")}, **flat}


def new_progress() -> Progress:
    """Progress bars of training runs. Levels of accuracy are shown from the easiest to the hardest, model FLOPs utilisation
    where it is known."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("loss {task.fields[loss]:.3f}  right {task.fields[accuracy]:.1%}{task.fields[levels]}"),
        TextColumn("{task.fields[speed]:,} tokens/s{task.fields[mfu]} {task.fields[memory]}"),
        console=Console(stderr=True),
    )


def add_run(progress: Progress, name: str, steps: int) -> TaskID:
    """Add the bar of a run."""
    return progress.add_task(name, total=steps, loss=float("nan"), accuracy=0.0, levels="", speed=0, mfu="", memory="")


def advance(progress: Progress, bar: TaskID, metrics: dict[str, Any]) -> None:
    """Show a line of metrics on the bar of its run."""
    progress.update(
        bar,
        completed=metrics["step"],
        loss=metrics["loss"],
        accuracy=metrics["accuracy"],
        levels=_by_level(metrics),
        speed=metrics["tokens_per_second"],
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
