"""Bamba: Mamba-2, and attention that rotates half of each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.checkpoints.family import Family, Names, compact, expect, families, options, under
from zoo.checkpoints.llama import ATTENTION, LAYER, heads, read_bias, size, write_heads, write_size
from zoo.checkpoints.mamba import MAMBA2, step_limit
from zoo.config import ModelConfig
from zoo.errors import ZooError, counted

TOP: Names = {"model.embed_tokens.weight": "embed.weight", "model.final_layernorm.weight": "norm.weight", "lm_head.weight": "head.weight"}
BLOCK: Names = {
    "input_layernorm.weight": "mixer_norm.weight",
    "pre_ff_layernorm.weight": "mlp_norm.weight",
    **{f"feed_forward.{name}_proj.{part}": f"mlp.{name}_proj.{part}" for name in ("gate", "up", "down") for part in ("weight", "bias")},
}
SSM = under("mamba.", MAMBA2)


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    count, places = config["num_hidden_layers"], config.get("attn_layer_indices") or []
    if outside := [i for i in places if not 0 <= i < count]:
        raise ZooError(f"attn_layer_indices: {outside[0]} is not one of the {counted(count, 'layer')}")
    attention = {**heads(config, kv_heads=8, part=0.5, context=262_144), **read_bias(config)}
    if attention["rotary"] != 0.5:
        raise ZooError(f"partial_rotary_factor: {attention['rotary']}: upstream always rotates half of a head; want 0.5")
    expect(config, "attn_rotary_emb", None, attention["head_dim"] // 2)
    blocks = {"attn": attention, "mamba2": ssm(config)}
    kinds = ["attn" if i in places else "mamba2" for i in range(count)]
    return {
        **size({"rms_norm_eps": 1e-5, **config}),
        "layers": compact(kinds),
        "blocks": {kind: blocks[kind] for kind in set(kinds)},
        "mlps": {"swiglu": {"bias": expect(config, "mlp_bias", False, True, default=False)}},
    }


def ssm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the options of Mamba-2 as Bamba and its relatives spell them."""
    count, expand = config.get("mamba_n_heads", 128), config.get("mamba_expand", 2)
    inner, head_dim = expand * config["hidden_size"], config.get("mamba_d_head", "auto")
    head_dim = inner // count if head_dim == "auto" else head_dim
    if count * head_dim != inner:
        raise ZooError(
            f"mamba_n_heads: {counted(count, 'head')} of mamba_d_head {head_dim}; want {inner} channels in all (mamba_expand * hidden_size)"
        )
    return {
        "expand": expand,
        "head_dim": head_dim,
        **within_heads(config),
    }


def within_heads(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the options of Mamba-2 that do not depend on its number of channels."""
    return {
        "state_dim": config.get("mamba_d_state", 256),
        "groups": config.get("mamba_n_groups", 1),
        "conv_size": config.get("mamba_d_conv", 4),
        "conv_bias": config.get("mamba_conv_bias", True),
        "bias": config.get("mamba_proj_bias", False),
        "norm_eps": config.get("rms_norm_eps", 1e-5),
        **step_limit(config),
    }


def write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_size(config, "bamba", "BambaForCausalLM"),
        **write_heads(config),
        **write_ssm(config),
        "attn_layer_indices": [i for i, kind in enumerate(config.pattern) if kind == "attn"],
        "attention_bias": options(config, "attn").bias,
        "mlp_bias": config.mlps.get("swiglu", {}).get("bias", False),
    }


def write_ssm(config: ModelConfig) -> dict[str, Any]:
    """Write the options of Mamba-2 as Bamba and its relatives spell them."""
    made = options(config, "mamba2")
    return {
        "mamba_expand": made.expand,
        "mamba_n_heads": made.expand * config.d_model // made.head_dim,
        "mamba_d_head": made.head_dim,
        "mamba_d_state": made.state_dim,
        "mamba_n_groups": made.groups,
        "mamba_d_conv": made.conv_size,
        "mamba_conv_bias": made.conv_bias,
        "mamba_proj_bias": made.bias,
        "time_step_limit": list(made.dt_limit),
    }


families.register("bamba", Family(read=read, write=write, top=TOP, layer=LAYER, block=BLOCK, mixers={"attn": ATTENTION, "mamba2": SSM}))
