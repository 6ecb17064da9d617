"""The folder of a training run: settings, metrics, and the checkpoints it resumes from.

train.yaml                      the settings; a run resumes only under the same ones
metrics.jsonl                   a line per logged step
no_decay.txt                    names of the parameters without weight decay, if there is weight decay
checkpoints/00001000/           each written whole or not at all
    model.safetensors zoo.yaml  a folder for zoo.load, independent of the number of processes
    optimizer.safetensors       tensors of the optimiser states
    progress.json               steps done, held-out loss, numbers of the optimiser states
model.safetensors zoo.yaml results.json    after the last step
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from zoo.checkpoints.own import write_config
from zoo.checkpoints.stored import WEIGHTS
from zoo.config import read_yaml
from zoo.errors import ZooError
from zoo.files import new_folder, refuse_existing, replacing
from zoo.model import Model
from zoo.system import lock
from zoo.training.parallel import Team, local, shard_like

SETTINGS, METRICS, RESULTS = "train.yaml", "metrics.jsonl", "results.json"
NO_DECAY = "no_decay.txt"
OPTIMIZER, PROGRESS = "optimizer.safetensors", "progress.json"


class NotFiniteError(Exception):
    """Weights or optimiser states contain NaN or infinity."""


class RunFolder:
    """The folder `path` of a run with `settings`, on a disk that all processes share. Nothing is written before `locked`.

    Raises:
        ZooError: `path` holds something else: no run, a run with other settings, or a finished one.
    """

    def __init__(self, path: Path, settings: dict[str, Any], team: Team | None = None) -> None:
        self.path, self.settings, self.team = path, settings, team or Team(torch.device("cpu"))
        if not (path / SETTINGS).is_file():
            refuse_existing(path)
            return
        there = read_yaml(path / SETTINGS)
        for field in {**settings, **there}:
            if there.get(field) != settings.get(field):
                was, now = there.get(field), settings.get(field)
                raise ZooError(
                    f"{path}: holds a run with {field}: {was}, not {now}; resume with the same settings, or choose another folder"
                )
        if (path / RESULTS).exists():
            raise ZooError(f"{path}: already holds this run, finished; nothing is overwritten, choose another folder")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder if there is none, and hold its lock. Raises ZooError if another run holds it."""
        self.team.barrier()  # until all have looked
        with self._lock() if self.team.is_main else nullcontext():
            self.team.barrier()
            yield

    @contextmanager
    def _lock(self) -> Iterator[None]:
        if not (self.path / SETTINGS).is_file():
            with new_folder(self.path) as folder:
                (folder / SETTINGS).write_text(yaml.safe_dump(self.settings, sort_keys=False), encoding="utf-8")
        with (self.path / SETTINGS).open(encoding="utf-8") as file:
            if not lock(file):
                raise ZooError(f"{self.path}: another process is training here")
            for scratch in self.path.glob("checkpoints/.*"):  # left by a process that was killed
                shutil.rmtree(scratch)
            yield

    def record_exempt(self, names: list[str]) -> None:
        """Record the parameters without weight decay. Raises ZooError if the run began with different ones."""
        path = self.path / NO_DECAY
        recorded = path.read_text(encoding="utf-8").splitlines() if path.is_file() else None
        if recorded is None and not self.checkpoints():
            if self.team.is_main:
                with replacing(path) as file:
                    file.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        elif recorded != names:
            raise ZooError(f"{self.path}: began with weight decay on different parameters (see {NO_DECAY}); start again in another folder")
        self.team.barrier()

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        return sorted(self.path.glob("checkpoints/[0-9]*"))

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the checkpoint to resume from and its progress."""
        folders = self.checkpoints()
        return (folders[-1], self.progress(folders[-1])) if folders else None

    @staticmethod
    def progress(checkpoint: Path) -> dict[str, Any]:
        """Read the progress that was saved with a checkpoint."""
        return json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))

    def save(self, model: Model, tensors: dict[str, Tensor], progress: dict[str, Any], *, keep: int) -> Path:
        """Write a checkpoint; then remove all but the newest `keep` and the one with the lowest held-out loss.

        Args:
            tensors: optimiser states.
            progress: at least `step` and `held_out_loss` (None: not measured).
        Raises:
            NotFiniteError: NaN or infinity, from which a run could not resume.
        """
        weights = model.state_dict()
        broken = [name for name, tensor in {**weights, **tensors}.items() if not local(tensor).isfinite().all()]
        if self.team.any(bool(broken)):
            raise NotFiniteError(f"{broken[0] if broken else 'a parameter'} is not finite after step {progress['step']}")
        path = self.path / "checkpoints" / f"{progress['step']:08d}"
        with new_folder(path) if self.team.is_main else nullcontext() as scratch:
            folder = Path(self.team.broadcast(str(scratch)))
            self.team.save(weights, folder / WEIGHTS)
            self.team.save(tensors, folder / OPTIMIZER)
            if self.team.is_main:
                write_config(model, folder)
                (folder / PROGRESS).write_text(json.dumps(progress, indent=2) + "\n", encoding="utf-8")
        if self.team.is_main:
            self._remove_all_but(keep)
        return path

    def _remove_all_but(self, keep: int) -> None:
        best = self.best()
        for old in self.checkpoints()[:-keep]:
            if old != best:
                doomed = old.with_name(f".{old.name}")
                os.replace(old, doomed)
                shutil.rmtree(doomed)

    def best(self) -> Path | None:
        """Return the checkpoint with the lowest held-out loss."""
        losses = {path: self.progress(path)["held_out_loss"] for path in self.checkpoints()}
        return min((path for path, loss in losses.items() if loss is not None), key=losses.__getitem__, default=None)

    @staticmethod
    @torch.no_grad()
    def load(checkpoint: Path, model: Model) -> dict[str, Tensor]:
        """Load the weights of a checkpoint into `model`; return the optimiser states, sharded like the parameters."""
        parameters = model.state_dict()
        with safe_open(checkpoint / WEIGHTS, "pt") as file:
            model.load_state_dict({name: shard_like(file.get_tensor(name), parameters.get(name)) for name in file.keys()})  # noqa: SIM118
        with safe_open(checkpoint / OPTIMIZER, "pt") as file:
            return {key: shard_like(file.get_tensor(key), parameters.get(key.partition("/")[2])) for key in file.keys()}  # noqa: SIM118

    @contextmanager
    def metrics(self, after: int) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Append lines of metrics, after dropping those beyond step `after`. Yields the function that writes one."""
        self.trim_metrics(after)
        with (self.path / METRICS).open("a", encoding="utf-8") as file:

            def write_line(metrics: dict[str, Any]) -> None:
                file.write(json.dumps(metrics) + "\n")
                file.flush()

            yield write_line

    def trim_metrics(self, step: int) -> None:
        """Drop the lines after `step`, which will be written again, and an incomplete last line."""
        path = self.path / METRICS
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
        with replacing(path) as file:
            file.write_text("".join(kept), encoding="utf-8")

    def finish(self, model: Model, results: dict[str, Any]) -> None:
        """Write the final model and the results."""
        self.team.save(model.state_dict(), self.path / WEIGHTS)
        if self.team.is_main:
            write_config(model, self.path)
            with replacing(self.path / RESULTS) as file:
                file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
