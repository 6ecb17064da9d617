"""Inputs of a run besides its settings: it resumes, is extended and is compared only with the same ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from zoo.checkpoints.own import read_config
from zoo.checkpoints.stored import read_json
from zoo.config import ModelConfig
from zoo.errors import ZooError
from zoo.files import replacing
from zoo.training.run_folder import RunFolder, difference

INPUTS = "inputs.json"
RESTORE = "restore it, or begin a new run"


def record_inputs(folder: Path, inputs: Mapping[str, str]) -> None:
    """Write the fingerprints of a run's inputs by field, unless there are none or they are there."""
    if inputs and not (folder / INPUTS).exists():
        with replacing(folder / INPUTS) as file:
            file.write_text(json.dumps(dict(inputs), indent=2) + "\n", encoding="utf-8")


def check_inputs(folder: Path, inputs: Mapping[str, str]) -> None:
    """Raise ZooError if a run began with inputs of other fingerprints."""
    if (folder / INPUTS).is_file():
        began = read_json(folder / INPUTS)
        for field, found in inputs.items():
            if began.get(field, found) != found:
                raise ZooError(f"{folder}: {field}: changed since this run began; {RESTORE}")


def check_config(run: RunFolder, config: ModelConfig) -> None:
    """Raise ZooError if the newest checkpoint of a run is of a model with another config."""
    began = None
    if newest := run.newest():
        with suppress(ZooError):  # damaged: `RunFolder.newest_whole` reports it
            began = read_config(newest).computed()
    if began is not None and began != config.computed():
        field, was, now = difference("model", {"model": began}, {"model": config.computed()})
        raise ZooError(f"{run.path}: {field}: {now}, but {was} when this run began; {RESTORE}")
