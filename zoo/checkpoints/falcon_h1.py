"""Falcon-H1: attention and Mamba-2 side by side in every layer, and a factor for nearly every projection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from zoo.checkpoints.bamba import BLOCK, SSM, TOP, within_heads
from zoo.checkpoints.family import Family, Names, Taps, compact, expect, families, options
from zoo.checkpoints.llama import ATTENTION, LAYER, heads, read_bias, size, write_heads, write_size
from zoo.config import ModelConfig
from zoo.errors import ZooError, counted

SCALES = {
    "attention_in_multiplier": "attn_in_scale",
    "attention_out_multiplier": "attn_out_scale",
    "ssm_in_multiplier": "mamba2_in_scale",
    "ssm_out_multiplier": "mamba2_out_scale",
}


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    for field, *allowed in (("attn_layer_indices", None), ("mamba_use_mlp", True, None), ("sliding_window", None)):
        expect(config, field, *allowed)
    for field in ("layer_types", "layers_block_type"):
        for kind in config.get(field) or []:
            expect({field: kind}, field, "hybrid")
    attention = {**heads(config, kv_heads=8, context=8192), **read_bias(config)}
    if (key_scale := config.get("key_multiplier", 1.0)) <= 0:
        raise ZooError(f"key_multiplier: {key_scale} must be greater than 0")
    attention["scale"] = key_scale / math.sqrt(attention["head_dim"])
    gate_scale, scale = factors(config, "mlp_multipliers", 2)
    both = {"attn": attention, "mamba2": ssm(config), **{ours: config.get(theirs, 1.0) for theirs, ours in SCALES.items()}}
    bias = expect(config, "mlp_bias", False, True, default=False)
    return {
        **size({"rms_norm_eps": 1e-5, **config}),
        "layers": compact(["parallel"] * config["num_hidden_layers"]),
        "blocks": {"parallel": both},
        "mlps": {"swiglu": {"bias": bias, "gate_scale": gate_scale, "scale": scale}},
        "embed_scale": config.get("embedding_multiplier", 1.0),
        "logits_scale": config.get("lm_head_multiplier", 1.0),
    }


def ssm(config: Mapping[str, Any]) -> dict[str, Any]:
    count, head_dim, inner = config.get("mamba_n_heads", 128), config.get("mamba_d_head", "auto"), config.get("mamba_d_ssm", 1024)
    inner = config.get("mamba_expand", 2) * config["hidden_size"] if inner is None else inner
    head_dim = inner // count if head_dim == "auto" else head_dim
    if count * head_dim != inner:
        raise ZooError(f"mamba_n_heads: {counted(count, 'head')} of mamba_d_head {head_dim}; want {inner} channels in all (mamba_d_ssm)")
    norm = "before_gate" if config.get("mamba_norm_before_gate", True) else "after_gate"
    return {
        "heads": count,
        "head_dim": head_dim,
        **within_heads(config),
        "o_bias": config.get("projectors_bias", False),
        "scales": factors(config, "ssm_multipliers", 5),
        "norm": norm if config.get("mamba_rms_norm", False) else None,
    }


def factors(config: Mapping[str, Any], field: str, count: int) -> list[float]:
    """Read a list of factors; without one, all are 1."""
    stated = config.get(field)
    made: list[float] = [1.0] * count if stated is None else list(stated)
    if len(made) != count:
        raise ZooError(f"{field}: {counted(len(made), 'factor')}; want {count}")
    return made


def write(config: ModelConfig) -> dict[str, Any]:
    both, swiglu = options(config, "parallel"), config.mlps.get("swiglu", {})
    attention, mamba = both.attn, both.mamba2
    count = mamba.heads or mamba.expand * config.d_model // mamba.head_dim
    stated = write_heads(config, attention)
    head_dim = stated["head_dim"]
    return {
        **write_size(config, "falcon_h1", "FalconH1ForCausalLM"),
        **stated,
        "attention_bias": attention.bias,
        "mlp_bias": swiglu.get("bias", False),
        "mamba_d_ssm": count * mamba.head_dim,
        "mamba_n_heads": count,
        "mamba_d_head": mamba.head_dim,
        "mamba_d_state": mamba.state_dim,
        "mamba_n_groups": mamba.groups,
        "mamba_d_conv": mamba.conv_size,
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.bias,
        "projectors_bias": mamba.bias if mamba.o_bias is None else mamba.o_bias,
        "mamba_rms_norm": mamba.norm is not None,
        "mamba_norm_before_gate": mamba.norm == "before_gate",
        "time_step_limit": list(mamba.dt_limit),
        **{theirs: getattr(both, ours) for theirs, ours in SCALES.items()},
        "key_multiplier": float(f"{(attention.scale or head_dim**-0.5) * math.sqrt(head_dim):.12g}"),
        "ssm_multipliers": list(mamba.scales),
        "mlp_multipliers": [swiglu.get("gate_scale", 1.0), swiglu.get("scale", 1.0)],
        "embedding_multiplier": config.embed_scale,
        "lm_head_multiplier": config.logits_scale,
    }


def inside(part: str, names: Names) -> Names:
    """Return `names` with our names preceded by that of a part of the mixer."""
    convolution = {theirs: Taps(tuple(f"{part}.{name}" for name in ours.ours)) for theirs, ours in names.items() if isinstance(ours, Taps)}
    return {**{theirs: f"{part}.{ours}" for theirs, ours in names.items() if isinstance(ours, str)}, **convolution}


families.register(
    "falcon_h1",
    Family(
        read=read,
        write=write,
        top=TOP,
        layer=LAYER,
        block=BLOCK,
        mixers={"parallel": {**inside("attn", ATTENTION), **inside("mamba2", SSM)}},
    ),
)
