"""The folder of a training run: its settings, its metrics, and checkpoints from which it goes on.

train.yaml                      the settings; a folder goes on only under the same
metrics.jsonl                   a line per logged step
checkpoints/00001000/           written whole or not at all
    model.safetensors zoo.yaml  a folder for zoo.load, the same whether one process trains or many
    optimizer.safetensors       what the optimisers remember
    progress.json               steps done, held-out loss, numbers the optimisers remember
model.safetensors zoo.yaml results.json    the end of the run
"""

from __future__ import annotations

import fcntl
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
from zoo.training.parallel import Team, held, shared_like

SETTINGS, METRICS, RESULTS = "train.yaml", "metrics.jsonl", "results.json"
OPTIMIZER, PROGRESS = "optimizer.safetensors", "progress.json"


class NotFiniteError(Exception):
    """Weights, or what an optimiser remembers, hold NaN or infinity."""


class RunFolder:
    """The folder `path` of a run with `settings`, on a disk that the whole team sees. Making this object writes nothing.

    Raises:
        ZooError: something else is there: not a run, a run of other settings, or one that is finished.
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
                    f"{path}: holds a run with {field}: {was}, not {now}; go on with the same settings, or choose another folder"
                )
        if (path / RESULTS).exists():
            raise ZooError(f"{path}: holds this run already, finished; nothing is overwritten, choose another folder")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder if there is none, and keep other teams from training in it. Raises ZooError."""
        self.team.wait()  # until all have looked
        with self._locked() if self.team.first else nullcontext():
            self.team.wait()
            yield

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if not (self.path / SETTINGS).is_file():
            with new_folder(self.path) as folder:
                (folder / SETTINGS).write_text(yaml.safe_dump(self.settings, sort_keys=False), encoding="utf-8")
        with (self.path / SETTINGS).open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ZooError(f"{self.path}: another process is training here") from None
            for scratch in self.path.glob("checkpoints/.*"):  # of a process that was killed
                shutil.rmtree(scratch)
            yield

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.path.glob("checkpoints/[0-9]*"))

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to go on from, and its progress."""
        folders = self.checkpoints()
        return (folders[-1], self.progress(folders[-1])) if folders else None

    @staticmethod
    def progress(checkpoint: Path) -> dict[str, Any]:
        return json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))

    def save(self, model: Model, tensors: dict[str, Tensor], progress: dict[str, Any], *, keep: int) -> Path:
        """Write a checkpoint; then remove all but the newest `keep` and the one with the least held-out loss.

        Args:
            progress: at least the `step` and the `held_out_loss` (None: not measured).
        Raises:
            NotFiniteError: numbers that are not finite, which would be no good to go on from.
        """
        weights = model.state_dict()
        broken = [name for name, tensor in {**weights, **tensors}.items() if not held(tensor).isfinite().all()]
        if self.team.any(bool(broken)):
            raise NotFiniteError(f"{broken[0] if broken else 'a parameter'} is not finite after step {progress['step']}")
        path = self.path / "checkpoints" / f"{progress['step']:08d}"
        with new_folder(path) if self.team.first else nullcontext() as scratch:
            folder = Path(self.team.told(str(scratch)))
            self.team.save(weights, folder / WEIGHTS)
            self.team.save(tensors, folder / OPTIMIZER)
            if self.team.first:
                write_config(model, folder)
                (folder / PROGRESS).write_text(json.dumps(progress, indent=2) + "\n", encoding="utf-8")
        if self.team.first:
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
        """The checkpoint with the least held-out loss."""
        losses = {path: self.progress(path)["held_out_loss"] for path in self.checkpoints()}
        return min((path for path, loss in losses.items() if loss is not None), key=losses.__getitem__, default=None)

    @staticmethod
    @torch.no_grad()
    def load(checkpoint: Path, model: Model) -> dict[str, Tensor]:
        """Put the checkpoint's weights into `model`; what the optimisers remember of the parameters that this process holds."""
        parameters = model.state_dict()
        with safe_open(checkpoint / WEIGHTS, "pt") as file:
            model.load_state_dict({name: shared_like(file.get_tensor(name), parameters.get(name)) for name in file.keys()})  # noqa: SIM118
        with safe_open(checkpoint / OPTIMIZER, "pt") as file:
            return {key: shared_like(file.get_tensor(key), parameters.get(key.partition("/")[2])) for key in file.keys()}  # noqa: SIM118

    @contextmanager
    def metrics(self, after: int) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Write lines of metrics behind those up to step `after`."""
        self.trim_metrics(after)
        with (self.path / METRICS).open("a", encoding="utf-8") as file:

            def write_line(metrics: dict[str, Any]) -> None:
                file.write(json.dumps(metrics) + "\n")
                file.flush()

            yield write_line

    def trim_metrics(self, step: int) -> None:
        """Forget the lines after `step`, which will be written again, and half a line."""
        path = self.path / METRICS
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
        with replacing(path) as file:
            file.write_text("".join(kept), encoding="utf-8")

    def finish(self, model: Model, results: dict[str, Any]) -> None:
        self.team.save(model.state_dict(), self.path / WEIGHTS)
        if self.team.first:
            write_config(model, self.path)
            with replacing(self.path / RESULTS) as file:
                file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
