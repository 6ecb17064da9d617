"""Granite 4.0: Mamba-2 and attention with four scales, and experts next to a shared MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.checkpoints.bamba import ssm, write_ssm
from zoo.checkpoints.experts import joined, stacked
from zoo.checkpoints.family import Family, compact, expect, families, layer_kinds, options, under
from zoo.checkpoints.llama import ATTENTION, LAYER, TOP, heads, read_bias, size, write_heads, write_size
from zoo.checkpoints.mamba import MAMBA2
from zoo.config import ModelConfig

WORDS = {"mamba": "mamba2", "linear_attention": "mamba2", "attention": "attn", "full_attention": "attn"}


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    expect(config, "normalization_function", "rmsnorm", default="rmsnorm")
    kinds = layer_kinds({"layer_types": config.get("layers_block_type"), **config}, WORDS, lambda i: "mamba2")
    attention = {**heads(config, context=2048), **read_bias(config), "scale": config.get("attention_multiplier", 1.0)}
    if expect(config, "position_embedding_type", "rope", "nope", None) != "rope":
        attention = {key: value for key, value in attention.items() if not key.startswith("rope")} | {"rotary": 0.0}
    blocks = {"attn": attention, "mamba2": ssm({"rms_norm_eps": 1e-6, **config}) if "mamba2" in kinds else {}}
    residual, shared = config.get("residual_multiplier", 1.0), config.get("shared_intermediate_size", 1024)
    fields = {
        **size(config),
        "d_ff": shared,
        "layers": compact(kinds),
        "blocks": {kind: {**blocks[kind], "residual_scale": residual} for kind in set(kinds)},
        "embed_scale": config.get("embedding_multiplier", 1.0),
        "logits_scale": 1 / config.get("logits_scaling", 1.0),
    }
    if experts := config.get("num_local_experts", 8):
        moe = {"experts": experts, "top_k": config.get("num_experts_per_tok", 2), "width": config["intermediate_size"], "shared": shared}
        fields |= {"mlp": "moe", "mlps": {"moe": moe}}
    return fields


def write(config: ModelConfig) -> dict[str, Any]:
    attention, moe = options(config, "attn"), config.mlps.get("moe", {}) if "moe" in config.mlp_pattern else {}
    return {
        **write_size(config, "granitemoehybrid", "GraniteMoeHybridForCausalLM"),
        **write_heads(config),
        **(write_ssm(config) if "mamba2" in config.pattern else {"mamba_n_heads": 1}),
        "layer_types": ["attention" if kind == "attn" else "mamba" for kind in config.pattern],
        "attention_bias": attention.bias,
        "attention_multiplier": attention.scale or (attention.head_dim or config.d_model // attention.heads) ** -0.5,
        "position_embedding_type": "rope" if attention.rotary else "nope",
        "residual_multiplier": options(config, config.pattern[0]).residual_scale,
        "embedding_multiplier": config.embed_scale,
        "logits_scaling": float(f"{1 / config.logits_scale:.12g}"),
        "shared_intermediate_size": config.mlp_width,
        "intermediate_size": moe.get("width") or config.mlp_width,
        "num_local_experts": moe.get("experts", 0),
        "num_experts_per_tok": moe.get("top_k", 0),
    }


families.register(
    "granitemoehybrid",
    Family(
        read=read,
        write=write,
        top=TOP,
        layer=LAYER,
        block={"input_layernorm.weight": "mixer_norm.weight", "post_attention_layernorm.weight": "mlp_norm.weight"},
        mixers={"attn": ATTENTION, "mamba2": under("mamba.", MAMBA2)},
        mlps={
            "swiglu": joined("shared_mlp.", "mlp."),
            "moe": {
                **joined("shared_mlp.", "mlp.shared."),
                **stacked(*(f"block_sparse_moe.{name}.weight" for name in ("router.layer", "input_linear", "output_linear"))),
            },
        },
    ),
)
