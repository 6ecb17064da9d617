"""Create models with random weights, the weights in a folder, or published weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.blocks.block import Block
from zoo.blocks.experts import Experts
from zoo.blocks.mixer import Mixer
from zoo.blocks.moe import Router
from zoo.blocks.norm import RMSNorm
from zoo.checkpoints import own, upstream
from zoo.checkpoints.companions import COMPANIONS, read_companions
from zoo.config import ModelConfig, resolve
from zoo.devices import usable_device
from zoo.dtypes import parse_dtype
from zoo.errors import ZooError
from zoo.model import Model

DOWNLOADED = ("config.json", "model*.safetensors", "model.safetensors.index.json")
"""Files of a repository that hold a model in one format; its tokenizer and other companions come with them."""


def create(
    model: str | Path | Mapping[str, Any] | ModelConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    seed: int = 0,
    pretrained: bool | str | Path = False,
    **overrides: Any,
) -> Model:
    """Build a model with randomly initialised weights, or with those of a checkpoint.

    Args:
        model: a name with suffixes ("gdn4-sleep4"), the path of a YAML file, or a config.
        device: "meta" builds the modules without allocating memory.
        dtype: dtype of the weights and activations, or its name ("bfloat16"); fast weights are float32 or wider.
        seed: seed of the weights, which are the same on every run of one device type.
        pretrained: a folder to take the weights from. It may hold an upstream checkpoint (inserted blocks keep their initial
            weights), or a model written by `zoo.save` or `zoo train`, whose sleep settings may differ. True: download the
            weights that the config names.
        overrides: config fields, for example `layers="attn gdn", d_model=128, blocks={"gdn": {"heads": 2}}`.
    Raises:
        ZooError: an unknown name or field, a value that does not fit, or a checkpoint of another architecture.
    """
    dtype = parse_dtype(dtype)
    config = resolve(model, overrides)
    checkpoint = _download(config) if pretrained is True else Path(pretrained) if pretrained else None
    device = usable_device(device)
    with torch.device("meta"):
        made = Model(config).to(dtype)
    if checkpoint is not None:
        made.companions = read_companions(checkpoint)
    if checkpoint is not None and (checkpoint / own.CONFIG).is_file():
        upstream.check_same_architecture(resolve(checkpoint / own.CONFIG), config, checkpoint / own.CONFIG)
        own.fill(made, checkpoint, device, dtype)
        return made
    if checkpoint is not None:
        upstream.fill(made, checkpoint, device, dtype)
    if device.type != "meta":
        _allocate(made, device)
        init_weights(made, torch.Generator(device).manual_seed(seed), inserted_only=checkpoint is not None)
    return made


@torch.no_grad()
def init_weights(model: Model, generator: torch.Generator, *, inserted_only: bool = False) -> None:
    """Initialise every parameter, or only those of inserted blocks and of the injection.

    Weights are normal with a standard deviation of fan_in^-0.5; those of block outputs are smaller by the square root of the
    number of residual branches. Anything inserted into a trained model has no effect at first.
    """
    config, blocks = model.config, [module for module in model.blocks if isinstance(module, Block)]
    branches = sum(1 if block.mlp is None else 2 for block in blocks)
    chosen = [block for block in blocks if block.inserted] if inserted_only else [model]
    # children first: a mixer has the last word on its projections
    for name, module in reversed([named for part in chosen for named in part.named_modules()]):
        if isinstance(module, Block):
            if module.inserted:
                nn.init.zeros_(module.mixer.get_parameter("o_proj.weight"))
        elif isinstance(module, Mixer):
            module.init_weights(generator)
        elif isinstance(module, Experts):
            module.init_weights(generator, branches**-0.5)
        elif isinstance(module, Router) and module.correction is not None:
            nn.init.zeros_(module.correction)
        elif isinstance(module, nn.Linear):
            scale = branches**-0.5 if name.endswith(("o_proj", "down_proj", "latent_out")) else 1.0
            nn.init.normal_(module.weight, std=scale * module.in_features**-0.5, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # token and position embeddings start at different sizes, so that neither hides the other
            std = 0.5 if name == "positions" else config.d_model**-0.5 if config.tie_embeddings else 1.0
            nn.init.normal_(module.weight, std=std, generator=generator)
        elif isinstance(module, RMSNorm):
            nn.init.constant_(module.weight, module.neutral)
    if config.inject:
        nothing, much = (-8.0, 0.0) if config.inject == "bounded" else (0.0, 1.0)  # the bounded gate is a sigmoid of these
        nn.init.constant_(model.inject, nothing if inserted_only else much)


def _allocate(model: Model, device: torch.device) -> None:
    """Allocate the parameters and buffers that are still on the meta device."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device)))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device=device))


def _download(config: ModelConfig) -> Path:
    """Download the config's repository; returns its folder in the cache of huggingface_hub: config.json and one format of the weights."""
    if config.hub is None:
        raise ZooError(f"{config.name}: pretrained: no published weights are known; give the path of a folder instead")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ZooError(f"{config.name}: pretrained: downloading {config.hub} needs huggingface_hub; install it, or give a folder") from None
    try:
        folder = Path(snapshot_download(config.hub, allow_patterns=[*DOWNLOADED, *COMPANIONS]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(config.hub, allow_patterns=["pytorch_model.bin"])
    except Exception as error:  # whichever exception the network or the hub raises
        why = str(error).strip().partition("\n")[0]
        raise ZooError(f"{config.name}: pretrained: {config.hub} cannot be downloaded: {why}; give the path of a folder instead") from None
    return folder
