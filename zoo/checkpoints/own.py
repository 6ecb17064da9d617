"""Making models, and keeping them: `create`, `save`, `load`. A saved model is a folder of model.safetensors and zoo.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from zoo.checkpoints import upstream
from zoo.checkpoints.stored import WEIGHTS, open_folder
from zoo.config import ModelConfig, resolve
from zoo.errors import ZooError
from zoo.files import new_folder, replacing
from zoo.model import Model

CONFIG = "zoo.yaml"


def create(
    model: str | Path | Mapping[str, Any] | ModelConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    pretrained: bool | str | Path = False,
    **overrides: Any,
) -> Model:
    """A model with fresh weights, or with those of a checkpoint.

    Args:
        model: a name with suffixes ("gdn4-sleep4"), the path of a YAML file, or a config.
        device: "meta" makes the modules without memory.
        dtype: of the weights and activations; fast weights are float32 or wider.
        seed: of the weights; the same on every run of one device type.
        pretrained: a folder to take the weights from, of upstream (inserted blocks keep their fresh weights), or of `save` or
            `zoo train`, where the model may have slept otherwise. True: download the one that the config names.
        overrides: config fields, for example `layers="attn gdn", d_model=128, blocks={"gdn": {"heads": 2}}`.
    Raises:
        ZooError: an unknown name or field, or a value that does not fit; a checkpoint of another architecture.
    """
    config = resolve(model, overrides)
    checkpoint = _download(config) if pretrained is True else Path(pretrained) if pretrained else None
    with torch.device("meta"):
        made = Model(config).to(dtype)
    if checkpoint is not None and (checkpoint / CONFIG).is_file():
        upstream.same_architecture(resolve(checkpoint / CONFIG), config, checkpoint / CONFIG)
        _fill(made, checkpoint, device, dtype)
        return made
    if checkpoint is not None:
        upstream.fill(made, checkpoint, device, dtype)
    if torch.device(device).type != "meta":
        _materialise(made, torch.device(device))
        made.init_weights(torch.Generator(device).manual_seed(seed), inserted_only=checkpoint is not None)
    return made


def _materialise(model: Model, device: torch.device) -> None:
    """Give memory to the parameters that have none."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device)))


def _download(config: ModelConfig) -> Path:
    """The folder of the config's repository in the cache of huggingface_hub: config.json and the weights, in one format."""
    if config.hub is None:
        raise ZooError(f"{config.name}: pretrained: no published weights are known; give the path of a folder instead")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ZooError(f"{config.name}: pretrained: downloading {config.hub} needs huggingface_hub; install it, or give a folder") from None
    try:
        folder = Path(snapshot_download(config.hub, allow_patterns=["config.json", "model*.safetensors", "model.safetensors.index.json"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(config.hub, allow_patterns=["pytorch_model.bin"])
    except Exception as error:  # whatever the network or the hub raises
        why = str(error).strip().partition("\n")[0]
        raise ZooError(f"{config.name}: pretrained: {config.hub} cannot be downloaded: {why}; give the path of a folder instead") from None
    return folder


def save(model: Model, path: str | Path, *, format: Literal["zoo", "hf"] = "zoo") -> None:
    """Write `model` to the new folder `path`.

    Args:
        format: "zoo" for this package, "hf" for config.json and tensor names of the upstream project.
    Raises:
        ZooError: the folder exists, or the upstream project has no place for what the model holds.
    """
    if format not in ("zoo", "hf"):
        raise ZooError(f"format: {format!r}; allowed: 'zoo', 'hf'")
    if format == "hf":
        return upstream.save(model, Path(path))
    with new_folder(Path(path)) as folder:
        write(model, folder)


def write(model: Model, folder: Path) -> None:
    """Write the two files of a model into an existing folder, each whole, in place of earlier ones."""
    with replacing(folder / WEIGHTS) as file:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file, metadata={"format": "pt"})
    write_config(model, folder)


def write_config(model: Model, folder: Path) -> None:
    with replacing(folder / CONFIG) as file:
        file.write_text(model.config.yaml(), encoding="utf-8")


def load(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Model:
    """The model in a folder that `save` or `zoo train` wrote, or that an upstream project did.

    Args:
        dtype: of the weights; default as stored.
    Raises:
        ZooError: a missing or damaged file, or tensors that do not fit the config; names the file and the tensor.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        if (folder / upstream.CONFIG).is_file():
            return upstream.load(folder, device=device, dtype=dtype)
        raise ZooError(f"{folder}: no {CONFIG} here, nor an upstream {upstream.CONFIG}; want a folder of zoo.save, zoo train or upstream")
    model = create(folder / CONFIG, device="meta")
    _fill(model, folder, device, dtype)
    return model


def _fill(model: Model, folder: Path, device: str | torch.device, dtype: torch.dtype | None) -> None:
    """Give every parameter the tensor in a folder of ours. Raises ZooError."""
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    with open_folder(folder, device) as stored:
        stored.check(folder, wanted, model.config.name)
        tensors = {name: stored.read(name, dtype) for name in wanted}
    model.load_state_dict(tensors, assign=True)
