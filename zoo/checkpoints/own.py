"""Save and load models. A saved model is a folder of model.safetensors and zoo.yaml."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from zoo.checkpoints import upstream
from zoo.checkpoints.stored import WEIGHTS, open_folder
from zoo.config import ModelConfig, resolve
from zoo.devices import usable_device
from zoo.dtypes import parse_dtype
from zoo.errors import ZooError
from zoo.files import new_folder, replacing
from zoo.model import Model

CONFIG = "zoo.yaml"


def save(model: Model, path: str | Path, *, format: Literal["zoo", "hf"] = "zoo") -> None:
    """Write `model` to the new folder `path`.

    Args:
        format: "zoo" for this package, "hf" for the config.json and tensor names of the upstream project.
    Raises:
        ZooError: the folder exists, or the upstream format cannot represent the model.
    """
    if format not in ("zoo", "hf"):
        raise ZooError(f"format: {format!r}; allowed: 'zoo', 'hf'")
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ZooError(f"{model.config.name}: the model is on the meta device and has no weights to save")
    if format == "hf":
        return upstream.save(model, Path(path))
    with new_folder(Path(path)) as folder:
        write(model, folder)


def write(model: Model, folder: Path) -> None:
    """Write the two files of a model into an existing folder, replacing each earlier one atomically."""
    with replacing(folder / WEIGHTS) as file:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file, metadata={"format": "pt"})
    write_config(model, folder)


def write_config(model: Model, folder: Path) -> None:
    """Write zoo.yaml."""
    with replacing(folder / CONFIG) as file:
        file.write_text(model.config.yaml(), encoding="utf-8")


def load(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None) -> Model:
    """Load the model in a folder written by `save`, by `zoo train` or by an upstream project.

    Args:
        dtype: dtype of the weights, or its name ("bfloat16"); default: as stored.
    Raises:
        ZooError: a missing or damaged file, or tensors that do not fit the config; names the file and the tensor.
    """
    dtype = None if dtype is None else parse_dtype(dtype)
    folder, device = Path(path), usable_device(device)
    if not (folder / CONFIG).is_file() and (folder / upstream.CONFIG).is_file():
        return upstream.load(folder, device=device, dtype=dtype)
    with torch.device("meta"):
        model = Model(read_config(folder))
    fill(model, folder, device, dtype)
    return model


def read_config(folder: Path) -> ModelConfig:
    """Return the config of a folder that `load` accepts, without reading its weights. Raises ZooError."""
    if (folder / CONFIG).is_file():
        return resolve(folder / CONFIG)
    if (folder / upstream.CONFIG).is_file():
        return resolve(upstream.read_config(folder))
    raise ZooError(f"{folder}: no {CONFIG} here, nor an upstream {upstream.CONFIG}; want a folder of zoo.save, zoo train or upstream")


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of the largest tensor in a folder, without reading it; float32 if there are no weights yet."""
    if not any(file.suffix in (".safetensors", ".pth", ".bin") for file in folder.iterdir()):
        return torch.float32
    with open_folder(folder) as stored:
        return stored.read(max(stored.shapes, key=lambda name: prod(stored.shapes[name]))).dtype


def fill(model: Model, folder: Path, device: str | torch.device, dtype: torch.dtype | None) -> None:
    """Replace every parameter of `model` with the tensor of that name in a folder of ours. Raises ZooError."""
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    with open_folder(folder, device) as stored:
        stored.check(folder, wanted, model.config.name)
        tensors = {name: stored.read(name, dtype) for name in wanted}
    model.to(tensors["embed.weight"].dtype).load_state_dict(tensors, assign=True)
