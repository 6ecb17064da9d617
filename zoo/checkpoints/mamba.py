"""Mamba and Mamba-2 as transformers writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from zoo.checkpoints.family import Family, Names, Taps, expect, families, options
from zoo.config import ModelConfig

TOP: Names = {"backbone.embeddings.weight": "embed.weight", "backbone.norm_f.weight": "norm.weight", "lm_head.weight": "head.weight"}
LAYER = "backbone.layers.{}."
MIXER: Names = {
    "in_proj.weight": "in_proj.weight",
    "in_proj.bias": "in_proj.bias",
    "conv1d.weight": Taps(("conv_weight",)),
    "conv1d.bias": "conv_bias",
    "A_log": "A_log",
    "D": "D",
    "out_proj.weight": "o_proj.weight",
    "out_proj.bias": "o_proj.bias",
}
MAMBA: Names = {
    **MIXER,
    "x_proj.weight": "x_proj.weight",
    "dt_proj.weight": "dt_proj.weight",
    "dt_proj.bias": "dt_proj.bias",
}
MAMBA2: Names = {**MIXER, "dt_bias": "dt_bias", "norm.weight": "norm_weight"}


def under(prefix: str, names: Names) -> Names:
    return {prefix + name: ours for name, ours in names.items()}


def size(config: Mapping[str, Any], kind: str, tied: bool) -> dict[str, Any]:
    expect(config, "hidden_act", "silu", "swish", default="silu")
    return {
        "vocab_size": config["vocab_size"],
        "d_model": config["hidden_size"],
        "layers": f"{kind}*{config['num_hidden_layers']}",
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "tie_embeddings": config.get("tie_word_embeddings", tied),
    }


def inner(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "mlp": False,
        "expand": config.get("expand", 2),
        "state_dim": config["state_size"],
        "conv_size": config.get("conv_kernel", 4),
        "conv_bias": config.get("use_conv_bias", True),
        "bias": config.get("use_bias", False),
    }


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    rank = config.get("time_step_rank", "auto")
    fields = {**inner(config), "dt_rank": None if rank == "auto" else rank}
    return {**size(config, "mamba", tied=True), "blocks": {"mamba": fields}}


def read2(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = {
        **inner(config),
        "head_dim": config["head_dim"],
        "groups": config["n_groups"],
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
    }
    if config["num_heads"] * config["head_dim"] != fields["expand"] * config["hidden_size"]:
        expect(config, "num_heads", fields["expand"] * config["hidden_size"] // config["head_dim"])
    limit = [_number(bound) for bound in config.get("time_step_limit", [0.0, math.inf])]
    if limit != [0.0, math.inf]:
        fields["dt_limit"] = limit
    return {**size(config, "mamba2", tied=False), "blocks": {"mamba2": fields}}


def _number(value: Any) -> float:
    """transformers 5 writes an infinity as {"__float__": "Infinity"}."""
    return float(value["__float__"] if isinstance(value, Mapping) else value)


def _write(config: ModelConfig, kind: str, architecture: str) -> dict[str, Any]:
    made = options(config, kind)
    return {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": len(config.pattern),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "expand": made.expand,
        "state_size": made.state_dim,
        "conv_kernel": made.conv_size,
        "use_conv_bias": made.conv_bias,
        "use_bias": made.bias,
    }


def write(config: ModelConfig) -> dict[str, Any]:
    made = options(config, "mamba")
    return {
        **_write(config, "mamba", "MambaForCausalLM"),
        "intermediate_size": made.expand * config.d_model,
        "time_step_rank": made.dt_rank or -(-config.d_model // 16),
    }


def write2(config: ModelConfig) -> dict[str, Any]:
    made = options(config, "mamba2")
    return {
        **_write(config, "mamba2", "Mamba2ForCausalLM"),
        "num_heads": made.expand * config.d_model // made.head_dim,
        "head_dim": made.head_dim,
        "n_groups": made.groups,
        "time_step_limit": list(made.dt_limit),
    }


for _kind, _read, _write_config, _names in (("mamba", read, write, MAMBA), ("mamba2", read2, write2, MAMBA2)):
    families.register(
        _kind,
        Family(
            read=_read,
            write=_write_config,
            top=TOP,
            layer=LAYER,
            block={"norm.weight": "mixer_norm.weight"},
            mixers={_kind: under("mixer.", _names)},
        ),
    )
