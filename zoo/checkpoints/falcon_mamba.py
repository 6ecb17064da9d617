"""Falcon-Mamba: Mamba with norms without weights on the step size, B and C."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zoo.checkpoints import mamba
from zoo.checkpoints.family import families, options
from zoo.config import ModelConfig


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = mamba.read(config)
    made = {**fields["blocks"]["mamba"], "inner_norm": "unit", "norm_eps": config.get("mixer_rms_eps", 1e-6)}
    return {**fields, "blocks": {"mamba": made}}


def write(config: ModelConfig) -> dict[str, Any]:
    return {
        **mamba.write(config),
        "architectures": ["FalconMambaForCausalLM"],
        "model_type": "falcon_mamba",
        "mixer_rms_eps": options(config, "mamba").norm_eps,
    }


families.register("falcon_mamba", replace(mamba.MAMBA_FAMILY, read=read, write=write))
