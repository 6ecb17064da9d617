"""Create models with random weights, the weights in a folder, or published weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zoo.checkpoints import own, upstream
from zoo.checkpoints.companions import read_companions
from zoo.checkpoints.hub import PREFIX, local_folder
from zoo.checkpoints.plain import cast, empty_model
from zoo.config import ModelConfig, resolve
from zoo.devices import usable_device
from zoo.dtypes import parse_dtype
from zoo.errors import ZooError
from zoo.initialise import initialise
from zoo.inputs import check_seed
from zoo.model import Model

WEIGHTS = Path(__file__).parent / "weights"
"""Models that come with the package, each in a folder of its full name."""


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
        dtype: dtype of the weights and activations, or its name ("bfloat16"). Norms, decays and fast weights are float32 or wider.
        seed: seed of the weights, which are the same on every run of one device type.
        pretrained: a folder, or "hf://owner/name@revision" on the Hugging Face hub, to take the weights from. It may hold an
            upstream checkpoint (inserted blocks keep their initial weights), or a model written by `zoo.save` or `zoo train`,
            whose sleep settings may differ. True: the weights that come with the package under this name, such as
            "cycle2-sleep4", or else a download of those that the config names.
        overrides: config fields, for example `layers="attn gdn", d_model=128, blocks={"gdn": {"heads": 2}}`.
    Raises:
        ZooError: an unknown name or field, a value that does not fit, or a checkpoint of another architecture.
    """
    check_seed(seed)
    dtype = parse_dtype(dtype)
    config = resolve(model, overrides)
    checkpoint = _published(config) if pretrained is True else local_folder(pretrained, "pretrained") if pretrained else None
    device = usable_device(device)
    made = cast(empty_model(config), dtype)
    if checkpoint is not None:
        made.companions = read_companions(checkpoint)
    if checkpoint is not None and (checkpoint / own.CONFIG).is_file():
        upstream.check_same_architecture(resolve(checkpoint / own.CONFIG), config, checkpoint / own.CONFIG)
        own.fill(made, checkpoint, device, dtype)
    elif checkpoint is not None:
        upstream.fill(made, checkpoint, device, dtype)
    initialise(made, device, seed)
    return made


def _published(config: ModelConfig) -> Path:
    """Return the folder of the weights that a name stands for: in the package, or downloaded."""
    known = sorted(folder.name for folder in WEIGHTS.iterdir())
    if config.name in known:
        return WEIGHTS / config.name
    if config.hub is not None:
        return local_folder(PREFIX + config.hub, f"{config.name}: pretrained")
    if relatives := [name for name in known if config.name.startswith(name.partition("-")[0])]:
        raise ZooError(f"{config.name}: pretrained: there are weights for {', '.join(relatives)}; `loops` changes the passes of each")
    raise ZooError(f"{config.name}: pretrained: no published weights are known; give the path of a folder instead")
