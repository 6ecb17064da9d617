"""Create models: fresh weights, a folder's weights, or published ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.checkpoints import own, upstream
from zoo.config import ModelConfig, resolve
from zoo.errors import ZooError
from zoo.model import Model


def create(
    model: str | Path | Mapping[str, Any] | ModelConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    pretrained: bool | str | Path = False,
    **overrides: Any,
) -> Model:
    """Build a model with fresh weights, or with those of a checkpoint.

    Args:
        model: a name with suffixes ("gdn4-sleep4"), the path of a YAML file, or a config.
        device: "meta" builds the modules without allocating memory.
        dtype: dtype of the weights and activations; fast weights are float32 or wider.
        seed: seed of the weights, which are the same on every run of one device type.
        pretrained: a folder to take the weights from. It may hold an upstream checkpoint (inserted blocks keep their fresh
            weights), or a model of `zoo.save` or `zoo train`, whose sleep settings may differ. True: download the weights that
            the config names.
        overrides: config fields, for example `layers="attn gdn", d_model=128, blocks={"gdn": {"heads": 2}}`.
    Raises:
        ZooError: an unknown name or field, a value that does not fit, or a checkpoint of another architecture.
    """
    config = resolve(model, overrides)
    checkpoint = _download(config) if pretrained is True else Path(pretrained) if pretrained else None
    with torch.device("meta"):
        made = Model(config).to(dtype)
    if checkpoint is not None and (checkpoint / own.CONFIG).is_file():
        upstream.check_same_architecture(resolve(checkpoint / own.CONFIG), config, checkpoint / own.CONFIG)
        own.fill(made, checkpoint, device, dtype)
        return made
    if checkpoint is not None:
        upstream.fill(made, checkpoint, device, dtype)
    if torch.device(device).type != "meta":
        _allocate(made, torch.device(device))
        made.init_weights(torch.Generator(device).manual_seed(seed), inserted_only=checkpoint is not None)
    return made


def _allocate(model: Model, device: torch.device) -> None:
    """Allocate the parameters that are still on the meta device."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device)))


def _download(config: ModelConfig) -> Path:
    """Download the config's repository; returns its folder in the cache of huggingface_hub: config.json and one format of the weights."""
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
    except Exception as error:  # whichever exception the network or the hub raises
        why = str(error).strip().partition("\n")[0]
        raise ZooError(f"{config.name}: pretrained: {config.hub} cannot be downloaded: {why}; give the path of a folder instead") from None
    return folder
