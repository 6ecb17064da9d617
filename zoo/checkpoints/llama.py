"""Llama, Mistral, Qwen2 and Qwen3: full or sliding attention, and SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from zoo.checkpoints.family import Family, Names, attention_kinds, compact, expect, families, options
from zoo.checkpoints.rope import rope, write_rope
from zoo.config import ModelConfig

TOP: Names = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight", "lm_head.weight": "head.weight"}
LAYER = "model.layers.{}."
MLP: Names = {f"mlp.{name}_proj.weight": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
BLOCK: Names = {"input_layernorm.weight": "mixer_norm.weight", "post_attention_layernorm.weight": "mlp_norm.weight", **MLP}
ATTENTION: Names = {
    **{f"self_attn.{name}_proj.{part}": f"{name}_proj.{part}" for name in "qkvo" for part in ("weight", "bias")},
    **{f"self_attn.{name}_norm.weight": f"{name}_norm.weight" for name in "qk"},
}

DEFAULTS: Mapping[str, Mapping[str, int | None]] = {
    "llama": {"context": 2048},
    "mistral": {"kv_heads": 8, "context": 131_072},
    "qwen2": {"kv_heads": 32, "context": 32_768},
    "qwen3": {"kv_heads": 32, "head_dim": 128, "context": 32_768},
}
"""Upstream's defaults for num_key_value_heads, head_dim and max_position_embeddings."""


def size(config: Mapping[str, Any], tied: bool = False) -> dict[str, Any]:
    """Read the fields that most transformers families share."""
    expect(config, "hidden_act", "silu", "swish", default="silu")
    return {
        "vocab_size": config["vocab_size"],
        "d_model": config["hidden_size"],
        "d_ff": config["intermediate_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tie_embeddings": config.get("tie_word_embeddings", tied),
    }


def heads(config: Mapping[str, Any], kv_heads: int | None = None, head_dim: int | None = None, **defaults: Any) -> dict[str, Any]:
    """Return the options of attention. The other arguments are upstream's defaults, including those of `rope`."""
    count = config["num_attention_heads"]
    fields = {
        "heads": count,
        "kv_heads": config.get("num_key_value_heads", kv_heads) or count,
        "head_dim": config.get("head_dim", head_dim) or config["hidden_size"] // count,
    }
    return {**fields, **rope(config, **defaults)}


def read_bias(config: Mapping[str, Any]) -> dict[str, Any]:
    bias = expect(config, "attention_bias", False, True, None) or False
    return {"bias": bias, "o_bias": bias}


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """Return the window of Qwen's sliding layers, or None if there are none."""
    return config.get("sliding_window", 4096) if config.get("use_sliding_window") else None


def write_size(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": len(config.pattern),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
    }


def write_heads(config: ModelConfig, attention: Any = None) -> dict[str, Any]:
    """Write the options of attention; default: those of the kind in the pattern."""
    attention = attention or options(config, "attn" if "attn" in config.pattern else "swa")
    return {
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        "head_dim": attention.head_dim or config.d_model // attention.heads,
        **write_rope(attention),
    }


def write_window(config: ModelConfig) -> dict[str, Any]:
    windowed = "swa" in config.pattern
    return {
        "use_sliding_window": windowed,
        "sliding_window": options(config, "swa").window if windowed else None,
        "layer_types": [{"attn": "full_attention", "swa": "sliding_attention"}[kind] for kind in config.pattern],
    }


def read(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    if model_type == "llama":
        expect(config, "mlp_bias", False, None)
        window, kinds = None, ["attn"] * config["num_hidden_layers"]
    elif model_type == "mistral":
        window = config.get("sliding_window", 4096)
        kinds = ["swa" if window else "attn"] * config["num_hidden_layers"]
    else:
        kinds = attention_kinds(config, window := sliding_window(config))
    fields: dict[str, Any] = heads(config, **DEFAULTS[model_type])
    if model_type == "qwen2":
        fields["bias"] = True
    elif model_type in ("llama", "qwen3"):
        fields |= read_bias(config)
    if model_type == "qwen3":
        fields |= {"qk_norm": "plain", "norm_eps": config.get("rms_norm_eps", 1e-6)}
    blocks = {kind: {**fields, "window": window} if kind == "swa" else fields for kind in set(kinds)}
    return {**size(config), "layers": compact(kinds), "blocks": blocks}


def write(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    window = write_window(config)
    if model_type in ("llama", "mistral"):
        window = {"sliding_window": window["sliding_window"]} if model_type == "mistral" else {}
    bias = {"attention_bias": options(config, config.pattern[0]).bias} if model_type in ("llama", "qwen3") else {}
    return {**write_size(config, model_type, architecture), **write_heads(config), **bias, **window}


for _type, _architecture in (
    ("llama", "LlamaForCausalLM"),
    ("mistral", "MistralForCausalLM"),
    ("qwen2", "Qwen2ForCausalLM"),
    ("qwen3", "Qwen3ForCausalLM"),
):
    families.register(
        _type,
        Family(
            read=partial(read, model_type=_type),
            write=partial(write, model_type=_type, architecture=_architecture),
            top=TOP,
            layer=LAYER,
            block=BLOCK,
            mixers={"attn": ATTENTION, "swa": ATTENTION},
        ),
    )
