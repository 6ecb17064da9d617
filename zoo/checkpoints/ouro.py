"""Ouro."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.checkpoints.family import Family, Names, attention_kinds, compact, families
from zoo.checkpoints.llama import ATTENTION, LAYER, MLP, TOP, heads, size, sliding_window, write_heads, write_size, write_window
from zoo.config import ModelConfig

# despite its name, upstream's post_attention norm precedes the MLP
BLOCK: Names = {
    "input_layernorm.weight": "mixer_norm.weight",
    "input_layernorm_2.weight": "mixer_post_norm.weight",
    "post_attention_layernorm.weight": "mlp_norm.weight",
    "post_attention_layernorm_2.weight": "mlp_post_norm.weight",
    **MLP,
}
GATE: Names = {"model.early_exit_gate.weight": "exit.gate.weight", "model.early_exit_gate.bias": "exit.gate.bias"}


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    window = sliding_window(config)
    kinds = attention_kinds(config, window)
    attention = {**heads(config, kv_heads=32), "post_norm": True}
    return {
        **size(config),
        "layers": compact(kinds),
        "blocks": {kind: {**attention, "window": window} if kind == "swa" else attention for kind in set(kinds)},
        "loop_norm": True,
        "wake_loops": config.get("total_ut_steps", 4),
        "exit": {"loop": config.get("early_exit_step"), "threshold": config.get("early_exit_threshold", 1.0)},
    }


def write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_size(config, "ouro", "OuroForCausalLM"),
        **write_heads(config),
        **write_window(config),
        "total_ut_steps": config.wake_loops,
        "early_exit_step": config.exit.loop if config.exit else None,
        "early_exit_threshold": config.exit.threshold if config.exit else None,
    }


families.register(
    "ouro", Family(read=read, write=write, top={**TOP, **GATE}, layer=LAYER, block=BLOCK, mixers={"attn": ATTENTION, "swa": ATTENTION})
)
