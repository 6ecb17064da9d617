"""Making models, and keeping them: `create`, `save`, `load`. A saved model is a folder of model.safetensors and zoo.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from zoo.config import ModelConfig, resolve
from zoo.files import new_folder, replacing
from zoo.kernels.registry import ZooError
from zoo.model import Model

WEIGHTS = "model.safetensors"
CONFIG = "zoo.yaml"


def create(
    model: str | Path | Mapping[str, Any] | ModelConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> Model:
    """A model with fresh weights.

    Args:
        model: a name with suffixes ("gdn4-sleep4"), the path of a YAML file, or a config.
        device: "meta" makes the modules without memory.
        dtype: of the weights and activations; fast weights are float32 or wider.
        seed: of the weights; the same on every run of one device type.
        overrides: config fields, for example `layers="attn gdn", d_model=128, blocks={"gdn": {"heads": 2}}`.
    Raises:
        ZooError: an unknown name or field, or a value that does not fit.
    """
    config = resolve(model, overrides)
    with torch.device("meta"):
        made = Model(config).to(dtype)
    if torch.device(device).type != "meta":
        made = made.to_empty(device=device)
        made.init_weights(torch.Generator(device).manual_seed(seed))
    return made


def save(model: Model, path: str | Path) -> None:
    """Write `model` to the new folder `path`. Raises ZooError if it exists."""
    with new_folder(Path(path)) as folder:
        write(model, folder)


def write(model: Model, folder: Path) -> None:
    """Write the two files of a model into an existing folder, each whole, in place of earlier ones."""
    with replacing(folder / WEIGHTS) as file:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file, metadata={"format": "pt"})
    with replacing(folder / CONFIG) as file:
        file.write_text(model.config.yaml(), encoding="utf-8")


def load(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Model:
    """The model in a folder that `save` or `zoo train` wrote.

    Args:
        dtype: of the weights; default as stored.
    Raises:
        ZooError: a missing or damaged file, or tensors that do not fit the config; names the file and the tensor.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise ZooError(f"{folder}: no {CONFIG} here; want a folder written by zoo.save or zoo train")
    model = create(folder / CONFIG, device="meta")
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    file = folder / WEIGHTS
    try:
        with safe_open(file, framework="pt", device=str(device)) as stored:
            if missing := sorted(wanted.keys() - stored.keys()):
                raise ZooError(f"{file}: tensor '{missing[0]}' is missing ({len(missing)} in all)")
            if unexpected := sorted(stored.keys() - wanted.keys()):
                raise ZooError(f"{file}: tensor '{unexpected[0]}' is not part of {model.config.name} ({len(unexpected)} in all)")
            for name, shape in wanted.items():
                if (found := stored.get_slice(name).get_shape()) != list(shape):
                    raise ZooError(f"{file}: tensor '{name}' is {found}, the config wants {list(shape)}")
            tensors = {name: stored.get_tensor(name).to(dtype) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{file}: cannot be read: {error}") from None
    model.load_state_dict(tensors, assign=True)
    return model
