"""Mamba and Mamba-2 in the formats of transformers and of the Mamba authors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zoo.checkpoints.family import Family, Names, Taps, expect, families, options, renamed, under
from zoo.config import ModelConfig
from zoo.errors import ZooError

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
    expand = config.get("expand", 2)
    expect(config, "intermediate_size", expand * config["hidden_size"], None)
    return {
        "mlp": False,
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "expand": expand,
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
    return {**size(config, "mamba2", tied=False), "blocks": {"mamba2": {**fields, **step_limit(config)}}}


def step_limit(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the bounds of the step size, if there are any."""
    limit = [_number(bound) for bound in config.get("time_step_limit") or [0.0, math.inf]]
    return {} if limit == [0.0, math.inf] else {"dt_limit": limit}


SSM_DEFAULTS: dict[str, Any] = {
    "Mamba1": {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto", "conv_bias": True, "bias": False},
    "Mamba2": {
        **{"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1, "conv_bias": True, "bias": False},
        **{"dt_limit": [0.0, math.inf], "d_ssm": None, "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False},
    },
}
# initialisation and speed: no effect on what a trained layer computes
SSM_OTHER = [
    "dt_min",
    "dt_max",
    "dt_init",
    "dt_scale",
    "dt_init_floor",
    "A_init_range",
    "conv_init",
    "chunk_size",
    "use_fast_path",
    "use_mem_eff_path",
]


def read_ssm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the format of Mamba's authors (mamba_ssm). The model is written back in the format of transformers."""
    expect(config, "attn_layer_idx", [], None)
    expect(config, "d_intermediate", 0, None)
    expect(config, "rms_norm", True, default=True)
    stated = dict(config.get("ssm_cfg") or {})
    layer = expect({"ssm_cfg.layer": stated.pop("layer", "Mamba1")}, "ssm_cfg.layer", *SSM_DEFAULTS)
    if unknown := stated.keys() - SSM_DEFAULTS[layer].keys() - set(SSM_OTHER):
        raise ZooError(f"ssm_cfg: {min(unknown)} is not a field of {layer}")
    ssm = SSM_DEFAULTS[layer] | stated
    made = {"mlp": False, "residual_in_fp32": config.get("residual_in_fp32", True)}
    made |= {
        "expand": ssm["expand"],
        "state_dim": ssm["d_state"],
        "conv_size": ssm["d_conv"],
        "conv_bias": ssm["conv_bias"],
        "bias": ssm["bias"],
    }
    if layer == "Mamba1":
        kind = "mamba"
        made["dt_rank"] = None if ssm["dt_rank"] == "auto" else ssm["dt_rank"]
    else:
        kind = "mamba2"
        inner = ssm["expand"] * config["d_model"]
        for name, *allowed in (("d_ssm", None, inner), ("D_has_hdim", False), ("rmsnorm", True), ("norm_before_gate", False)):
            expect(ssm, name, *allowed)
        made |= {"head_dim": ssm["headdim"], "groups": ssm["ngroups"], "dt_limit": ssm["dt_limit"], "norm_eps": 1e-5}
    multiple = config.get("pad_vocab_size_multiple", 8)
    return {
        "vocab_size": -(-config["vocab_size"] // multiple) * multiple,
        "d_model": config["d_model"],
        "layers": f"{kind}*{config['n_layer']}",
        "norm_eps": 1e-5,
        "tie_embeddings": config.get("tie_embeddings", True),
        "blocks": {kind: made},
        "upstream": {"model_type": kind},
    }


def _number(value: Any) -> float:
    """Decode a number; transformers 5 writes infinity as {"__float__": "Infinity"}."""
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
        "residual_in_fp32": made.residual_in_fp32,
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


MAMBA_FAMILY = Family(
    read=read,
    write=write,
    top=TOP,
    layer=LAYER,
    block={"norm.weight": "mixer_norm.weight"},
    mixers={"mamba": under("mixer.", MAMBA)},
)
MAMBA2_FAMILY = replace(MAMBA_FAMILY, read=read2, write=write2, mixers={"mamba2": under("mixer.", MAMBA2)})
families.register("mamba", MAMBA_FAMILY)
families.register("mamba2", MAMBA2_FAMILY)
families.register(
    "mamba_ssm",
    replace(
        MAMBA_FAMILY,
        read=read_ssm,
        write=None,
        top=renamed(TOP, lambda name: name.replace("embeddings", "embedding")),
        mixers={**MAMBA_FAMILY.mixers, **MAMBA2_FAMILY.mixers},
    ),
)
