"""Jamba: Mamba with norms on the step size, B and C, attention without positions, and experts in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.checkpoints.bamba import BLOCK, TOP
from zoo.checkpoints.experts import one_by_one
from zoo.checkpoints.family import Family, Names, compact, families, options, under
from zoo.checkpoints.llama import ATTENTION, LAYER, size, write_size
from zoo.checkpoints.mamba import MAMBA
from zoo.config import ModelConfig
from zoo.errors import ZooError

NORMS: Names = {f"{theirs}_layernorm.weight": f"{ours}_norm.weight" for theirs, ours in (("dt", "dt"), ("b", "B"), ("c", "C"))}


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    count, heads, experts = config["num_hidden_layers"], config["num_attention_heads"], config.get("num_experts", 16)
    rank = config.get("mamba_dt_rank", "auto")
    blocks = {
        "attn": {
            "heads": heads,
            "kv_heads": config.get("num_key_value_heads", 8) or heads,
            "head_dim": config["hidden_size"] // heads,
            "rotary": 0.0,
        },
        "mamba": {
            "expand": config.get("mamba_expand", 2),
            "state_dim": config.get("mamba_d_state", 16),
            "dt_rank": None if rank == "auto" else rank,
            "conv_size": config.get("mamba_d_conv", 4),
            "conv_bias": config.get("mamba_conv_bias", True),
            "bias": config.get("mamba_proj_bias", False),
            "inner_norm": "plain",
            "norm_eps": config.get("rms_norm_eps", 1e-6),
        },
    }
    kinds = ["attn" if places(config, "attn", 8, 4, i) else "mamba" for i in range(count)]
    mlps = ["moe" if experts > 1 and places(config, "expert", 2, 1, i) else "swiglu" for i in range(count)]
    moe = {"experts": experts, "top_k": config.get("num_experts_per_tok", 2), "normalise": False}
    return {
        **size(config),
        "layers": compact(kinds),
        "blocks": {kind: blocks[kind] for kind in set(kinds)},
        "mlp": compact(mlps),
        "mlps": {"moe": moe} if "moe" in mlps else {},
    }


def places(config: Mapping[str, Any], what: str, period: int, offset: int, layer: int) -> bool:
    """Return whether a layer has attention, or experts; the other arguments are upstream's defaults."""
    period, offset = config.get(f"{what}_layer_period", period), config.get(f"{what}_layer_offset", offset)
    if not 0 <= offset < period:
        raise ZooError(f"{what}_layer_offset: {offset}; want 0 to {period - 1} ({what}_layer_period - 1)")
    return layer % period == offset


def write(config: ModelConfig) -> dict[str, Any]:
    mamba, attention, kinds = options(config, "mamba"), options(config, "attn"), config.mlp_pattern
    moe = config.mlps.get("moe", {})
    return {
        **write_size(config, "jamba", "JambaForCausalLM"),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        **dict(zip(("attn_layer_period", "attn_layer_offset"), every([kind == "attn" for kind in config.pattern]), strict=True)),
        **dict(zip(("expert_layer_period", "expert_layer_offset"), every([kind == "moe" for kind in kinds]), strict=True)),
        "num_experts": moe["experts"] if "moe" in kinds else 1,
        "num_experts_per_tok": moe.get("top_k", 2),
        "mamba_expand": mamba.expand,
        "mamba_d_state": mamba.state_dim,
        "mamba_dt_rank": mamba.dt_rank or -(-config.d_model // 16),
        "mamba_d_conv": mamba.conv_size,
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.bias,
    }


def every(found: list[bool]) -> tuple[int, int]:
    """Return a period and an offset that give exactly the layers marked true."""
    for period in range(1, len(found) + 2):
        for offset in range(period):
            if found == [i % period == offset for i in range(len(found))]:
                return period, offset
    raise ZooError("layers: this checkpoint format only places attention and experts at every n-th layer")


families.register(
    "jamba",
    Family(
        read=read,
        write=write,
        top=TOP,
        layer=LAYER,
        block=BLOCK,
        mixers={"attn": ATTENTION, "mamba": under("mamba.", {**MAMBA, **NORMS})},
        mlps={"moe": one_by_one("feed_forward.", router="router.weight")},
    ),
)
