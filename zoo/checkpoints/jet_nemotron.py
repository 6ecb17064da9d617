"""Jet-Nemotron."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.checkpoints.family import Family, Names, compact, families, layer_kinds, options, truncated_ratio
from zoo.checkpoints.llama import ATTENTION, BLOCK, LAYER, TOP, heads, size, write_heads, write_size
from zoo.config import ModelConfig
from zoo.errors import ZooError

JET: Names = {
    **{f"self_attn.{name}_proj.weight": f"{name}_proj.weight" for name in "qkvgabo"},
    "self_attn.A_log": "A_log",
    "self_attn.dt_bias": "dt_bias",
    "self_attn.dynamic_conv1d.kernel_generator.w1.weight": "kernel_in.weight",
    "self_attn.dynamic_conv1d.kernel_generator.w2.weight": "kernel_out.weight",
    "self_attn.dynamic_conv1d.kernel_generator.w2.bias": "kernel_out.bias",
    "self_attn.o_norm.weight": "o_norm.weight",
}

JET_DEFAULTS: dict[str, Any] = {
    "mode": "chunk",
    "dconv_implementation": "triton",
    "num_heads": 6,
    "head_dim": 256,
    "expand_v": 2.0,
    "conv_size": 4,
    "dconv_generator_reduction": 8,
    "norm_eps": 1e-5,
}


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    kinds = layer_kinds(config, {kind: kind for kind in ("jet", "attn", "swa")}, lambda i: "attn")
    efficient = config.get("efficient_attention_config") or {}
    attention = {**heads(config, kv_heads=2, theta=1e6), "bias": True}
    blocks: dict[str, Any] = {}
    if "attn" in kinds:
        blocks["attn"] = attention
    if "swa" in kinds:
        blocks["swa"] = {**attention, "window": efficient["swa"]["window_size"]}
    if "jet" in kinds:
        jet = JET_DEFAULTS | efficient["jet"]
        if unknown := jet.keys() - JET_DEFAULTS.keys():
            raise ZooError(f"efficient_attention_config.jet: {min(unknown)} is not an upstream field")
        blocks["jet"] = {
            "heads": jet["num_heads"],
            "head_dim": jet["head_dim"],
            "expand_v": int(jet["head_dim"] * jet["expand_v"]) / jet["head_dim"],
            "conv_size": jet["conv_size"],
            "generator_reduction": jet["dconv_generator_reduction"],
            "norm_eps": float(jet["norm_eps"]),
        }
    return {**size(config, tied=True), "norm": "wide", "layers": compact(kinds), "blocks": blocks}


def write(config: ModelConfig) -> dict[str, Any]:
    jet, attention = options(config, "jet"), write_heads(config)
    del attention["head_dim"]
    efficient: dict[str, Any] = {
        "jet": {
            **JET_DEFAULTS,
            "num_heads": jet.heads,
            "head_dim": jet.head_dim or config.d_model // jet.heads,
            "expand_v": truncated_ratio(jet.expand_v),
            "conv_size": jet.conv_size,
            "dconv_generator_reduction": jet.generator_reduction,
            "norm_eps": str(jet.norm_eps),
        }
    }
    if "swa" in config.pattern:
        efficient["swa"] = {"window_size": options(config, "swa").window}
    return {
        **write_size(config, "jet_nemotron", "JetNemotronForCausalLM"),
        **attention,
        "layer_types": list(config.pattern),
        "efficient_attention_config": efficient,
    }


families.register(
    "jet_nemotron",
    Family(read=read, write=write, top=TOP, layer=LAYER, block=BLOCK, mixers={"jet": JET, "attn": ATTENTION, "swa": ATTENTION}),
)
