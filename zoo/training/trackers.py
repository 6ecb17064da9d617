"""Services that a training run reports to, such as Weights & Biases: `zoo train ... --track NAME`."""

from __future__ import annotations

import hashlib
import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from zoo.errors import ZooError
from zoo.registry import Registry
from zoo.training.config import Report, TrainConfig

ACCELERATE = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio")
"""Names of accelerate's trackers, apart from wandb."""
PROJECT = "sleep-zoo"
"""Project of runs in accelerate's trackers."""
PATIENCE = 30.0
"""Seconds that a run waits at its end for a tracker."""


class Tracker(ABC):
    """A service that records runs. It is created before the run, and then called in order from a thread of its own."""

    @abstractmethod
    def begin(self, run_id: str, name: str, config: dict[str, Any], folder: Path) -> None:
        """Begin a run, or continue it if it was resumed.

        Args:
            run_id: 16 hexadecimal digits, the same whenever the run is resumed in the same folder.
            name: name of the folder.
            config: the fields of `TrainConfig`, as in YAML.
        """

    @abstractmethod
    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step, by name. A resumed run may repeat steps."""

    @abstractmethod
    def end(self) -> None:
        """Send what has not been sent: the run has finished, stopped or failed."""

    def __str__(self) -> str:
        """Return its name in warnings."""
        return type(self).__name__


trackers: Registry[Callable[[], Tracker]] = Registry("tracker", "trackers")


@trackers.register("wandb")
class WeightsAndBiases(Tracker):
    """A run of Weights & Biases, in `project` or else in the one that WANDB_PROJECT names. Raises ZooError if it is not installed."""

    def __init__(self, project: str | None = None) -> None:
        try:
            import wandb
        except ImportError:
            option = "--track: wandb" if project is None else f"--wandb: {project}"
            raise ZooError(f"{option}: needs pip install 'sleep-zoo[wandb]'") from None
        self._wandb, self._project = wandb, project

    def begin(self, run_id: str, name: str, config: dict[str, Any], folder: Path) -> None:
        options = {"project": self._project, "name": name, "id": run_id, "resume": "allow", "dir": str(folder), "config": config}
        self._run = self._wandb.init(**options)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def end(self) -> None:
        self._run.finish()


class Accelerate(Tracker):
    """A run of one of accelerate's trackers. Raises ZooError if accelerate or the tracker is not installed.

    A resumed run continues in those that let a run choose its id: comet_ml, swanlab and trackio; and in those that write to its folder:
    dvclive and tensorboard.
    """

    def __init__(self, name: str) -> None:
        try:
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
        except ImportError:
            raise ZooError(f"--track: {name}: needs pip install accelerate {name}") from None
        if name not in map(str, get_available_trackers()):
            raise ZooError(f"--track: {name}: needs pip install {name}")
        self._class = LOGGER_TYPE_TO_CLASS[name]

    def begin(self, run_id: str, name: str, config: dict[str, Any], folder: Path) -> None:
        from accelerate import PartialState

        identity: dict[str, dict[str, Any]] = {
            "clearml": {"task_name": name},
            "comet_ml": {"experiment_key": 2 * run_id},  # at least 32 characters
            "dvclive": {"dir": str(folder / "dvclive"), "resume": True},
            "mlflow": {"run_name": name},
            "swanlab": {"id": run_id, "experiment_name": name, "resume": "allow"},
            "trackio": {"name": f"{name}-{run_id}", "resume": "allow"},
        }
        options = identity.get(self._class.name, {}) | ({"logging_dir": folder} if self._class.requires_logging_directory else {})
        PartialState(cpu=True)  # without it, the trackers cannot log
        self._tracker = self._class(PROJECT, **options)
        self._tracker.start()
        fields = {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in flat(config).items()}
        self._tracker.store_init_configuration(fields)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._tracker.log(metrics, step=step)

    def end(self) -> None:
        self._tracker.finish()

    def __str__(self) -> str:
        return self._class.name


for _name in ACCELERATE:
    trackers.register(_name, partial(Accelerate, _name))


def new_tracker(name: str) -> Tracker:
    """Return a tracker by its name, or by an import path such as "package.module:Class". Raises ZooError."""
    module, colon, attribute = name.partition(":")
    if not colon:
        return trackers.get(name)()
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # a module may raise anything while it is imported
        raise ZooError(f"--track: {name}: {' '.join(f'{type(error).__name__}: {error}'.split())}") from None
    if not isinstance(made, Tracker):
        raise ZooError(f"--track: {name}: {type(made).__name__}; want a subclass of zoo.training.trackers.Tracker")
    return made


@contextmanager
def reporting_to(tracker: Tracker, config: TrainConfig, folder: Path) -> Iterator[Report]:
    """Yield a function that hands lines of metrics to a tracker. One that fails or hangs only causes a warning."""
    lines: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
    thread = Thread(target=_deliver, args=(lines, tracker, config, folder), daemon=True)
    thread.start()
    try:
        yield lines.put
    finally:
        lines.put(None)
        thread.join(PATIENCE)
        if thread.is_alive():
            _warn(tracker, f"has not answered for {PATIENCE:g} seconds; the last metrics may be missing there")


def _deliver(lines: SimpleQueue[dict[str, Any] | None], tracker: Tracker, config: TrainConfig, folder: Path) -> None:
    """Call a tracker for every line until None. A run without a line never begins."""
    begun = False
    try:
        while (line := lines.get()) is not None:
            if not begun:
                run_id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
                tracker.begin(run_id, folder.name, config.model_dump(mode="json"), folder)
                begun = True
            tracker.log(line["step"], flat(line))
        if begun:
            tracker.end()
    except Exception as error:  # whichever exception a service raises
        _warn(tracker, " ".join(f"{type(error).__name__}: {error}".split()) + "; it receives no more metrics of this run")


def _warn(tracker: Tracker, why: str) -> None:
    print(f"tracker {tracker}: {why}", file=sys.stderr, flush=True)


def flat(metrics: dict[str, Any]) -> dict[str, float]:
    """Return metrics by name without the step, nested ones as `by_level/3`."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            numbers |= {f"{name}/{inner}": number for inner, number in flat(value).items()}
        elif name != "step":
            numbers[name] = value
    return numbers
