"""RecurrentGemma: RG-LRU and sliding-window attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from zoo.checkpoints.family import Family, Names, Taps, compact, expect, families, options
from zoo.checkpoints.llama import LAYER
from zoo.checkpoints.rope import rope, write_rope
from zoo.config import ModelConfig

KINDS = {"recurrent": "rglru", "attention": "swa"}
PARTS = ("weight", "bias")
RGLRU: Names = {
    **{
        f"temporal_block.{theirs}.{part}": f"{ours}.{part}"
        for theirs, ours in (("linear_x", "x_proj"), ("linear_y", "y_proj"), ("linear_out", "o_proj"))
        for part in PARTS
    },
    "temporal_block.conv_1d.weight": Taps(("conv_weight",)),
    "temporal_block.conv_1d.bias": "conv_bias",
    "temporal_block.rg_lru.recurrent_param": "decay",
    "temporal_block.rg_lru.input_gate_weight": "input_gate",
    "temporal_block.rg_lru.input_gate_bias": "input_bias",
    "temporal_block.rg_lru.recurrent_gate_weight": "recurrence_gate",
    "temporal_block.rg_lru.recurrent_gate_bias": "recurrence_bias",
}
ATTENTION: Names = {f"temporal_block.{name}_proj.{part}": f"{name}_proj.{part}" for name in "qkvo" for part in PARTS}


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    expect(config, "hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    expect(config, "embeddings_scale_by_sqrt_dim", True, default=True)
    hidden, heads, count = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    types = config.get("block_types") or ["recurrent", "recurrent", "attention"]
    kinds = [KINDS[expect({"block_types": types[i % len(types)]}, "block_types", *KINDS)] for i in range(count)]
    blocks = {
        "rglru": {"width": config.get("lru_width") or hidden, "heads": heads, "conv_size": config.get("conv1d_width", 4)},
        "swa": {
            "heads": heads,
            "kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or hidden // heads,
            "window": config.get("attention_window_size", 2048),
            "bias": expect(config, "attention_bias", False, True, default=False),
            "o_bias": True,
            **rope(config, part=0.5),
        },
    }
    return {
        "vocab_size": config["vocab_size"],
        "d_model": hidden,
        "d_ff": config["intermediate_size"] // 2,
        "norm": "centred",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tie_embeddings": config.get("tie_word_embeddings", True),
        "embed_scale": torch.tensor(hidden**0.5, dtype=torch.bfloat16).item(),
        "logits_cap": config.get("logits_soft_cap", 30.0),
        "layers": compact(kinds),
        "blocks": {kind: blocks[kind] for kind in set(kinds)},
        "mlp": "gelu",
        "mlps": {"gelu": {"bias": True}},
    }


def write(config: ModelConfig) -> dict[str, Any]:
    recurrent, attention, words = options(config, "rglru"), options(config, "swa"), {ours: theirs for theirs, ours in KINDS.items()}
    return {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "model_type": "recurrent_gemma",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": 2 * config.mlp_width,
        "num_hidden_layers": len(config.pattern),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_activation": "gelu_pytorch_tanh",
        "logits_soft_cap": config.logits_cap,
        "block_types": [words[kind] for kind in config.pattern],
        "lru_width": recurrent.width or config.d_model,
        "conv1d_width": recurrent.conv_size,
        "num_attention_heads": attention.heads if "swa" in config.pattern else recurrent.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        "attention_window_size": attention.window,
        "attention_bias": attention.bias,
        "partial_rotary_factor": attention.rotary,
        **({} if attention.head_dim in (None, config.d_model // attention.heads) else {"head_dim": attention.head_dim}),
        **write_rope(attention),
    }


families.register(
    "recurrent_gemma",
    Family(
        read=read,
        write=write,
        top={"model.embed_tokens.weight": "embed.weight", "model.final_norm.weight": "norm.weight", "lm_head.weight": "head.weight"},
        layer=LAYER,
        block={
            "temporal_pre_norm.weight": "mixer_norm.weight",
            "channel_pre_norm.weight": "mlp_norm.weight",
            **{f"mlp_block.{name}_proj.{part}": f"mlp.{name}_proj.{part}" for name in ("gate", "up", "down") for part in PARTS},
        },
        mixers={"rglru": RGLRU, "swa": ATTENTION},
    ),
)
