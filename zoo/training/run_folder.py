"""The folder of a training run: settings, metrics, and the checkpoints it resumes from.

train.yaml                      the settings; a run resumes only with the same ones, or with more steps once it has taken them all
metrics.jsonl                   a line per logged step
inputs.json                     fingerprints of the data, and of the weights that adapters are trained for; see `run_inputs`
no_decay.txt                    names of the parameters without weight decay, if there is weight decay
checkpoints/00001000/           each written atomically; the last one is of the last step
    model.safetensors zoo.yaml  a folder for zoo.load, independent of the number of processes
    optimizer.safetensors       tensors of the optimiser states
    progress.json               steps done, held-out loss, settings of products, numbers of the optimiser states, checksums of zoo.yaml
                                and of this file
checkpoints/damaged-00001000/   a checkpoint that did not match its checksums
model.safetensors zoo.yaml results.json    after the last step
adapter/                        instead of a model, if the run asks for adapters alone; checkpoints hold them merged
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from zoo.checkpoints.checksum import verify
from zoo.checkpoints.own import CONFIG, write_config
from zoo.checkpoints.stored import WEIGHTS
from zoo.config import read_yaml
from zoo.errors import ZooError
from zoo.files import is_scratch, new_folder, refuse_existing, remove_scratch, replacing
from zoo.model import Model
from zoo.system import lock
from zoo.training.lora import LoRA, adapted, merged_tensors, write_adapter
from zoo.training.parallel import Team, local, shard_like

SETTINGS, METRICS, RESULTS = "train.yaml", "metrics.jsonl", "results.json"
NO_DECAY, ADAPTER_FOLDER = "no_decay.txt", "adapter"
OPTIMIZER, PROGRESS = "optimizer.safetensors", "progress.json"
CHECKSUMS = "sha256"
DEFAULT = "its default"


class BusyError(ZooError):
    """Another process is training the run."""


class NotFiniteError(Exception):
    """Weights or optimiser states contain NaN or infinity."""


def difference(field: str, there: dict[str, Any], asked: dict[str, Any]) -> tuple[str, Any, Any]:
    """Return the dotted path of the first value that differs within a field, and both values."""
    ours, theirs = (values.get(field, DEFAULT) for values in (there, asked))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        inner = next(name for name in {**theirs, **ours} if ours.get(name, DEFAULT) != theirs.get(name, DEFAULT))
        inner, ours, theirs = difference(inner, ours, theirs)
        field = f"{field}.{inner}"
    return field, ours, theirs


class RunFolder:
    """The folder `path` of a run with `settings`, on a disk that all processes share. Nothing is written before `locked`.

    Raises:
        ZooError: `path` holds something else: no run, a run with other settings, or a finished one. A run that has taken all its
            steps may be extended.
    """

    extended = False
    """True if the run has taken all the steps that it was begun with, and `settings` has more."""

    def __init__(self, path: Path, settings: dict[str, Any], team: Team | None = None) -> None:
        self.path, self.settings, self.team = path, settings, team or Team(torch.device("cpu"))
        if not (path / SETTINGS).is_file():
            refuse_existing(path)
            return
        there = read_yaml(path / SETTINGS)
        was, now = there.get("steps"), settings.get("steps")
        if isinstance(was, int) and isinstance(now, int) and now > was and self._has_taken(was):
            self.extended, there["steps"] = True, now
        for field in {**settings, **there}:
            if there.get(field) != settings.get(field):
                field, held, asked = difference(field, there, settings)
                rule = "; a run can be extended once it has taken all its steps, but not shortened" if field == "steps" else ""
                raise ZooError(
                    f"{path}: holds a run with {field}: {held}, not {asked}{rule}; resume with the same settings, or choose another folder"
                )
        if (path / RESULTS).exists() and not self.extended:
            raise ZooError(
                f"{path}: already holds this run, finished; nothing is overwritten: choose another folder, or more steps than {now}"
            )

    def _has_taken(self, steps: int) -> bool:
        """True if the run has taken all its steps, and has a checkpoint from which more can be taken."""
        return self.checkpoint(steps).exists() or bool(self.checkpoints() and (self.path / RESULTS).exists())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder if there is none, and hold its lock. Raises BusyError if another process holds it."""
        self.team.barrier()  # until all have looked
        with self._lock() if self.team.is_main else nullcontext():
            self.team.barrier()
            yield

    @contextmanager
    def _lock(self) -> Iterator[None]:
        settings = yaml.safe_dump(self.settings, sort_keys=False)
        if not (self.path / SETTINGS).is_file():
            try:
                with new_folder(self.path) as folder:
                    (folder / SETTINGS).write_text(settings, encoding="utf-8")
            except ZooError:
                if (self.path / SETTINGS).is_file():  # another process was faster
                    raise BusyError(f"{self.path}: another process is training here") from None
                raise
        with self._lock_settings():
            remove_scratch(self.path)
            for doomed in self.path.glob("checkpoints/.*"):
                if is_scratch(doomed) or re.fullmatch(r"\.\d{8}", doomed.name):  # left by a process that was killed
                    shutil.rmtree(doomed)
            if not self.extended:
                yield
                return
            (self.path / RESULTS).unlink(missing_ok=True)
            with replacing(self.path / SETTINGS) as file:
                file.write_text(settings, encoding="utf-8")
            with self._lock_settings():  # of the new file
                yield

    @contextmanager
    def _lock_settings(self) -> Iterator[None]:
        with (self.path / SETTINGS).open(encoding="utf-8") as file:
            try:
                free = lock(file)
            except OSError as error:
                raise ZooError(f"{self.path}: cannot be locked: {error.strerror}; want a disk with file locks") from None
            if not free:
                raise BusyError(f"{self.path}: another process is training here")
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

    def checkpoint(self, step: int) -> Path:
        """Return the folder for the checkpoint after `step` steps."""
        return self.path / "checkpoints" / f"{step:08d}"

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        return sorted(self.path.glob("checkpoints/[0-9]*"))

    def newest(self) -> Path | None:
        """Return the newest checkpoint, or None."""
        return max(self.checkpoints(), default=None)

    def newest_whole(self) -> Path | None:
        """Return the checkpoint to resume from, or None. Newer ones that are damaged are named on stderr and set aside.

        Raises:
            ZooError: all checkpoints are damaged.
        """
        chosen, said = "", ""
        if self.team.is_main:
            damaged: dict[Path, str] = {}
            for checkpoint in reversed(self.checkpoints()):
                try:
                    self.verify(checkpoint)
                except ZooError as error:
                    damaged[checkpoint] = str(error)
                else:
                    chosen = str(checkpoint)
                    break
            if damaged and not chosen:
                said = f"{next(iter(damaged.values()))}; there is no whole checkpoint to resume from, start again in another folder"
            elif damaged:
                for checkpoint, why in damaged.items():
                    print(f"{why}; resuming from {chosen}", file=sys.stderr, flush=True)
                    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
                    shutil.rmtree(aside, ignore_errors=True)
                    os.replace(checkpoint, aside)
        if said := self.team.broadcast(said):
            raise ZooError(said)
        chosen = self.team.broadcast(chosen)
        return Path(chosen) if chosen else None

    @classmethod
    def verify(cls, checkpoint: Path) -> None:
        """Raise ZooError if a file of a checkpoint is missing or damaged. One without checksums is only read."""
        cls.progress(checkpoint)
        verify(checkpoint / WEIGHTS)
        verify(checkpoint / OPTIMIZER)

    @staticmethod
    def progress(checkpoint: Path) -> dict[str, Any]:
        """Read the progress that was saved with a checkpoint. Raises ZooError if it, or zoo.yaml, is damaged."""
        file = checkpoint / PROGRESS
        try:
            text = file.read_text(encoding="utf-8")
            progress = json.loads(text)
            sums = progress.pop(CHECKSUMS, {})
            whole = {"step", "tokens", "held_out_loss", "numbers"} <= progress.keys() and f"{progress['step']:08d}" == checkpoint.name
            if sums:
                whole &= sums == _checksums(progress, checkpoint) and text == _dump({**progress, CHECKSUMS: sums})
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise ZooError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
        if not whole:
            raise ZooError(f"{file}: damaged: it, or {CONFIG}, does not match its checksums")
        return progress

    def save(self, model: Model, tensors: dict[str, Tensor], progress: dict[str, Any], *, keep: int) -> Path:
        """Write a checkpoint; then remove all but the newest `keep` and the one with the lowest held-out loss.

        Args:
            tensors: optimiser states.
            progress: at least `step`, `tokens` and `held_out_loss` (None: not measured).
        Raises:
            NotFiniteError: NaN or infinity, from which a run could not resume.
        """
        weights = merged_tensors(model)
        broken = [name for name, tensor in {**weights, **tensors}.items() if not local(tensor).isfinite().all()]
        if self.team.any(bool(broken)):
            raise NotFiniteError(f"{broken[0] if broken else 'a parameter'} is not finite after step {progress['step']}")
        path = self.checkpoint(progress["step"])
        with new_folder(path) if self.team.is_main else nullcontext() as scratch:
            folder = Path(self.team.broadcast(str(scratch)))
            self.team.save(weights, folder / WEIGHTS)
            self.team.save(tensors, folder / OPTIMIZER)
            if self.team.is_main:
                write_config(model, folder)
                sums = _checksums(progress, folder)
                (folder / PROGRESS).write_text(_dump({**progress, CHECKSUMS: sums}), encoding="utf-8")
        if self.team.is_main:
            self._remove_all_but(keep)
        self.team.barrier()  # a process that stops before the checkpoint is written would make torchrun end the others
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
        losses: dict[Path, float] = {}
        for path in self.checkpoints():
            with suppress(ZooError):  # damaged
                if (loss := self.progress(path)["held_out_loss"]) is not None:
                    losses[path] = loss
        return min(losses, key=losses.__getitem__, default=None)

    @staticmethod
    @torch.no_grad()
    def load(checkpoint: Path, model: Model) -> dict[str, Tensor]:
        """Load the weights of a checkpoint into `model`; return the optimiser states, sharded like the parameters.

        A model with adapters keeps its initial weights: those of the checkpoint are merged, and the states hold the adapters.
        """
        parameters = model.state_dict()
        if not adapted(model):
            with safe_open(checkpoint / WEIGHTS, "pt") as file:
                model.load_state_dict({name: shard_like(file.get_tensor(name), parameters.get(name)) for name in file.keys()})  # noqa: SIM118
        with safe_open(checkpoint / OPTIMIZER, "pt") as file:
            return {key: shard_like(file.get_tensor(key), parameters.get(key.partition("/")[2])) for key in file.keys()}  # noqa: SIM118

    @contextmanager
    def metrics(self, after: int) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Append lines of metrics. Yields the function that writes one.

        Lines of a killed process beyond step `after` are kept: the same steps are taken again, so they are not written again.
        An extended run drops them, since its learning rates differ.
        """
        last = self.trim_metrics(after if self.extended else None)
        with (self.path / METRICS).open("a", encoding="utf-8") as file:

            def write_line(metrics: dict[str, Any]) -> None:
                if metrics["step"] > last:
                    file.write(json.dumps(metrics) + "\n")
                    file.flush()

            yield write_line

    def trim_metrics(self, step: int | None = None) -> int:
        """Drop the lines after `step`, and from the first line that is incomplete or damaged. Returns the step of the last line."""
        path = self.path / METRICS
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        last, kept = 0, []
        for line in lines:
            logged = _logged_step(line)
            if logged is None or logged <= last or (step is not None and logged > step):
                break
            last = logged
            kept.append(line)
        if len(kept) < len(lines):
            if lines[len(kept)].endswith(b"\n") and _logged_step(lines[len(kept)]) is None:
                print(f"{path}: line {len(kept) + 1} is damaged; it and those after it are dropped", file=sys.stderr, flush=True)
            with replacing(path) as file:
                file.write_bytes(b"".join(kept))
        return last

    def finish(self, model: Model, results: dict[str, Any], lora: LoRA | None = None) -> None:
        """Write the final model, or its adapters alone if `lora` says so, and the results."""
        whole = lora is None or lora.output == "merged"
        if whole:
            self.team.save(merged_tensors(model), self.path / WEIGHTS)
        if self.team.is_main:
            if lora is not None and not whole:
                weights = self.settings["weights"]
                base = self.settings["model"] if weights in (None, "hub") else weights
                write_adapter(model, lora, self.path / ADAPTER_FOLDER, base)
            else:
                write_config(model, self.path)
            with replacing(self.path / RESULTS) as file:
                file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _dump(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=2) + "\n"


def _checksums(progress: dict[str, Any], folder: Path) -> dict[str, str]:
    """Return the SHA-256 of `progress` and of the config beside it. The tensors have theirs in their own files."""
    return {
        PROGRESS: hashlib.sha256(_dump(progress).encode()).hexdigest(),
        CONFIG: hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest(),
    }


def _logged_step(line: bytes) -> int | None:
    """Return the step of a whole line of metrics."""
    try:
        step = json.loads(line.decode())["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None
