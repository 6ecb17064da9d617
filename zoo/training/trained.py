"""Find what has been trained so far at a path: a run, finished or not, one of its checkpoints, or the folder of a model."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from zoo.checkpoints.own import CONFIG
from zoo.errors import ZooError
from zoo.training.config import TrainConfig, read_config
from zoo.training.run_folder import PROGRESS, RESULTS, SETTINGS, RunFolder


class Trained(NamedTuple):
    """Weights, and the run that they come from."""

    folder: Path
    """Folder that `zoo.load` accepts."""
    run: TrainConfig | None
    step: int | None
    """Step of a checkpoint; None in the folder of a finished run, or of a model."""

    @property
    def parent(self) -> Path | None:
        """Return the folder of the initial weights, if the run began with some. Raises ZooError if it is gone."""
        if self.run is None or self.run.weights == "hub":
            return None
        named = Path(self.run.weights or self.run.model)
        if named.is_absolute() and not named.exists():
            raise ZooError(f"parent: {named}, where the run began, is gone; give --parent FOLDER")
        return named if named.is_dir() else None

    def __str__(self) -> str:
        return f"{self.folder}" if self.step is None or self.run is None else f"{self.folder} (step {self.step} of {self.run.steps})"


def find(path: Path) -> Trained:
    """Find the weights at `path`; of a run that has not finished, those of its newest checkpoint.

    Raises:
        ZooError: a run without a checkpoint, or a damaged file.
    """
    if (path / SETTINGS).is_file():
        run = read_config(path / SETTINGS)
        if (path / RESULTS).is_file() and (path / CONFIG).is_file():  # a run may end with adapters alone
            return Trained(path, run, None)
        newest = max(path.glob("checkpoints/[0-9]*"), default=None)
        if newest is None:
            raise ZooError(f"{path}: a run that has not written a checkpoint yet")
        return Trained(newest, run, RunFolder.progress(newest)["step"])
    settings = path.absolute().parent.parent / SETTINGS
    if (path / PROGRESS).is_file() and settings.is_file():
        return Trained(path, read_config(settings), RunFolder.progress(path)["step"])
    return Trained(path, None, None)
