"""Save and load models. A saved model is a folder of model.safetensors and zoo.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from zoo.checkpoints import upstream
from zoo.checkpoints.checksum import metadata
from zoo.checkpoints.companions import read_companions, write_companions
from zoo.checkpoints.hub import local_folder
from zoo.checkpoints.plain import cast, empty_model, plain_tensors, unwrap, wide_parameters
from zoo.checkpoints.stored import WEIGHTS, has_weights, kept_dtype, open_folder, refuse_adapter
from zoo.config import BETWEEN_PASSES, ModelConfig, merge, resolve
from zoo.devices import usable_device
from zoo.dtypes import parse_dtype
from zoo.errors import ZooError
from zoo.files import as_path, new_folder, replacing
from zoo.initialise import initialise
from zoo.layer_pattern import expand
from zoo.model import Model

CONFIG = "zoo.yaml"


def save(model: nn.Module, path: str | Path, *, format: Literal["zoo", "hf"] = "zoo") -> None:
    """Write a model to the new folder `path`, together with the tokenizer and the other files that came with its checkpoint.

    Args:
        model: a `Model`, or one that is compiled or wrapped in DistributedDataParallel or DataParallel.
        format: "zoo" for this package, "hf" for the config.json and tensor names of the upstream project.
    Raises:
        ZooError: the folder exists, the upstream format cannot represent the model, or its tensors are not those of its config.
    """
    if format not in ("zoo", "hf"):
        raise ZooError(f"format: {format!r}; allowed: 'zoo', 'hf'")
    model = unwrap(model)
    if format == "hf":
        return upstream.save(model, as_path(path))
    tensors = plain_tensors(model)
    with new_folder(as_path(path)) as folder:
        with replacing(folder / WEIGHTS) as file:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, file, metadata=metadata(contiguous))
        write_config(model, folder)


def write_config(model: Model, folder: Path) -> None:
    """Write zoo.yaml, and the files that travel with the model."""
    write_companions(model.companions, folder)
    with replacing(folder / CONFIG) as file:
        file.write_text(model.config.yaml(), encoding="utf-8")


def load(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None, **overrides: Any) -> Model:
    """Load the model in a folder written by `save`, by `zoo train` or by an upstream project.

    Args:
        path: the folder, or "hf://owner/name" or "hf://owner/name@revision", which is downloaded from the Hugging Face hub.
        dtype: dtype of the weights, or its name ("bfloat16"); default: as stored. Norms and decays are then float32 or wider.
        overrides: config fields, for example `loops=4, evict="hard", window=512` to make a checkpoint sleep. In
            `layers="(attn*4 gdn)*6"`, kinds that the checkpoint lacks are inserted; they have no effect before training.
    Raises:
        ZooError: a missing or damaged file, or tensors that do not fit the config; names the file and the tensor.
    """
    dtype = None if dtype is None else parse_dtype(dtype)
    folder, device = local_folder(path), usable_device(device)
    config = configure(folder, overrides)
    model = empty_model(config, str(folder / (CONFIG if (folder / CONFIG).is_file() else upstream.CONFIG)))
    _fill(model, folder, device, dtype)
    model.companions = read_companions(folder)
    initialise(model, device)
    return model


def configure(folder: Path, overrides: Mapping[str, Any]) -> ModelConfig:
    """Return the config of a folder with overrides applied. Kinds of blocks that it lacks are inserted, without MLPs. Raises ZooError."""
    stored = read_config(folder)
    if "layers" not in overrides:
        return resolve(stored, overrides)
    pattern = expand(str(overrides["layers"]))
    added = {kind: {"inserted": True, "mlp": False} for kind in pattern if kind not in stored.pattern}
    if [kind for kind in pattern if kind not in added] != list(stored.pattern):
        raise ZooError(f"{folder}: layers: '{overrides['layers']}': want '{stored.layers}', with other kinds of blocks inserted")
    return resolve(stored, {**overrides, "blocks": merge(added, overrides.get("blocks", {}))})


def read_config(folder: Path) -> ModelConfig:
    """Return the config of a folder that `load` accepts, without reading its weights. Raises ZooError."""
    if not folder.is_dir():
        raise ZooError(f"{folder}: {'a file; want a folder' if folder.exists() else 'no such folder'}")
    refuse_adapter(folder)
    if (folder / CONFIG).is_file():
        return resolve(folder / CONFIG)
    if (folder / upstream.CONFIG).is_file():
        return upstream.read_config(folder)
    if (folder / "bundle.json").is_file():
        raise ZooError(f"{folder}: an exported bundle, which zoo.export.load opens; want the folder of a model")
    if (folder / "train.yaml").is_file():
        newest = max(folder.glob("checkpoints/[0-9]*"), default=None)
        there = f"its newest checkpoint is {newest}" if newest else "it has no checkpoint"
        raise ZooError(f"{folder}: a training run without a final model; {there}")
    raise ZooError(f"{folder}: no {CONFIG} and no upstream {upstream.CONFIG}; want a folder written by zoo.save, zoo train or upstream")


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of the largest tensor in a folder, without reading it; float32 if there are no weights yet."""
    if not has_weights(folder):
        return torch.float32
    with open_folder(folder) as stored:
        return stored.main_dtype()


def _fill(model: Model, folder: Path, device: str | torch.device, dtype: torch.dtype | None) -> None:
    if (folder / CONFIG).is_file():
        fill(model, folder, device, dtype)
    else:
        upstream.fill(model, folder, device, dtype)


def fill(model: Model, folder: Path, device: str | torch.device, dtype: torch.dtype | None) -> None:
    """Replace every parameter of `model`, except those of blocks whose kind the stored model lacks, with a folder's tensors.

    Raises:
        ZooError: as `load`.
    """
    names, wide = _stored_names(model, resolve(folder / CONFIG)), wide_parameters(model)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    with open_folder(folder, device) as stored:
        for added in BETWEEN_PASSES - stored.shapes.keys():
            names.pop(added, None)
        stored.check(folder, {there: shapes[name] for name, there in names.items()}, model.config.name)
        tensors = {name: stored.read(there, kept_dtype(dtype, name in wide)) for name, there in names.items()}
    cast(model, tensors["embed.weight"].dtype).load_state_dict(tensors, assign=True, strict=False)


def _stored_names(model: Model, stored: ModelConfig) -> dict[str, str]:
    """Return the name in a folder of every parameter; blocks of kinds that the folder lacks are not counted."""
    kept = [i for i, kind in enumerate(model.config.pattern) if kind in stored.pattern]
    numbers, names = {str(i): str(n) for n, i in enumerate(kept)}, {}
    for name in model.state_dict():
        top, *rest = name.split(".")
        if top != "blocks":
            names[name] = name
        elif rest[0] in numbers:
            names[name] = ".".join(["blocks", numbers[rest[0]], *rest[1:]])
    return names
