"""Gated DeltaNet and Samba in the format of flash-linear-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.checkpoints import mamba
from zoo.checkpoints.family import Family, Names, Taps, compact, expect, families, options, truncated_ratio, under
from zoo.checkpoints.llama import MLP
from zoo.config import ModelConfig
from zoo.errors import ZooError, counted

GDN: Names = {
    **{f"{name}_proj.weight": f"{name}_proj.weight" for name in "qkvgabo"},
    **{f"{name}_conv1d.weight": Taps((f"{name}_conv",)) for name in "qkv"},
    "A_log": "A_log",
    "dt_bias": "dt_bias",
    "o_norm.weight": "o_norm.weight",
}
ATTENTION: Names = {
    **{f"{name}_proj.{part}": f"{name}_proj.{part}" for name in "qkvo" for part in ("weight", "bias")},
    **{f"{name}_norm.weight": f"{name}_norm.weight" for name in "qk"},
}


def read_size(config: Mapping[str, Any]) -> dict[str, Any]:
    expect(config, "hidden_act", "swish", "silu", default="swish")
    return {
        "vocab_size": config["vocab_size"],
        "d_model": config["hidden_size"],
        "d_ff": config.get("intermediate_size") or mlp_width(config["hidden_size"], config.get("hidden_ratio") or 4),
        "norm_eps": config["norm_eps"],
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }


def mlp_width(hidden_size: int, ratio: float) -> int:
    return -(-int(hidden_size * ratio * 2 / 3) // 256) * 256


def read_layers(config: Mapping[str, Any], kind: str, attn: Any) -> tuple[str, dict[str, Any]]:
    """Return the layer pattern, and the options of the attention layers that `attn` places among the layers of `kind`."""
    expect(config, "attnres_block_size", None)
    count, specs = config["num_hidden_layers"], [attn] if isinstance(attn, Mapping) else attn or []
    kinds = [kind] * count
    blocks: dict[str, Any] = {}
    for spec in specs:
        other = "swa" if spec.get("window_size") else "attn"
        fields = {"heads": spec["num_heads"], "kv_heads": spec.get("num_kv_heads") or spec["num_heads"]}
        fields |= {"bias": spec.get("qkv_bias", False), "rope_theta": spec.get("rope_theta", 10_000.0)}
        if other == "swa":
            fields["window"] = spec["window_size"]
        if blocks.setdefault(other, fields) != fields:
            raise ZooError(f"attn: layers {spec['layers']} differ from other '{other}' layers; one kind has one set of options")
        for i in spec["layers"]:
            if not 0 <= i < count:
                raise ZooError(f"attn: layers: {i} is not one of the {counted(count, 'layer')}")
            kinds[i] = other
    return compact(kinds), blocks


def read_gdn(config: Mapping[str, Any]) -> dict[str, Any]:
    expect(config, "use_short_conv", True, default=True)
    layers, blocks = read_layers(config, "gdn", config.get("attn"))
    blocks["gdn"] = {
        "heads": config["num_heads"],
        "value_heads": config.get("num_v_heads"),
        "head_dim": config["head_dim"],
        "expand_v": int(config["head_dim"] * config["expand_v"]) / config["head_dim"],
        "conv_size": config.get("conv_size", 4),
        "gate": config.get("use_gate", True),
        "neg_eigval": config.get("allow_neg_eigval", False),
        "norm_eps": config["norm_eps"],
    }
    return {**read_size(config), "layers": layers, "blocks": blocks}


def read_samba(config: Mapping[str, Any]) -> dict[str, Any]:
    layers, blocks = read_layers(config, "mamba", config["attn"])
    rank = config.get("time_step_rank", "auto")
    # upstream ignores use_conv_bias and residual_in_fp32
    blocks["mamba"] = {
        **mamba.inner(config),
        "mlp": True,
        "conv_bias": True,
        "residual_in_fp32": False,
        "dt_rank": None if rank == "auto" else rank,
    }
    # intermediate_size is the inner width of Mamba here
    return {**read_size({**config, "intermediate_size": None}), "layers": layers, "blocks": blocks}


def _write(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": len(config.pattern),
        "norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "swish",
    }
    specs = []
    for kind in ("attn", "swa"):
        if kind in config.pattern:
            attention = options(config, kind)
            specs.append(
                {
                    "layers": [i for i, name in enumerate(config.pattern) if name == kind],
                    "num_heads": attention.heads,
                    "num_kv_heads": attention.kv_heads or attention.heads,
                    "qkv_bias": attention.bias,
                    "rope_theta": attention.rope_theta,
                    "window_size": attention.window if kind == "swa" else None,
                }
            )
    return {**fields, "attn": specs[0] if len(specs) == 1 else specs or None}


def write_gdn(config: ModelConfig) -> dict[str, Any]:
    gdn = options(config, "gdn")
    return {
        **_write(config, "gated_deltanet", "GatedDeltaNetForCausalLM"),
        "intermediate_size": config.mlp_width,
        "num_heads": gdn.heads,
        "num_v_heads": gdn.value_heads,
        "head_dim": gdn.head_dim or config.d_model // gdn.heads,
        "expand_v": truncated_ratio(gdn.expand_v),
        "conv_size": gdn.conv_size,
        "use_short_conv": True,
        "use_gate": gdn.gate,
        "allow_neg_eigval": gdn.neg_eigval,
    }


def write_samba(config: ModelConfig) -> dict[str, Any]:
    made, ratio = options(config, "mamba"), 1.5 * config.mlp_width / config.d_model
    if mlp_width(config.d_model, ratio) != config.mlp_width:
        raise ZooError(f"d_ff: {config.mlp_width}: this checkpoint format only has MLP widths that are multiples of 256")
    return {
        **_write(config, "samba", "SambaForCausalLM"),
        "hidden_ratio": ratio,
        "state_size": made.state_dim,
        "expand": made.expand,
        "conv_kernel": made.conv_size,
        "use_bias": made.bias,
        "use_conv_bias": made.conv_bias,
        "time_step_rank": made.dt_rank or -(-config.d_model // 16),
    }


families.register(
    "gated_deltanet",
    Family(
        read=read_gdn,
        write=write_gdn,
        top={"model.embeddings.weight": "embed.weight", "model.norm.weight": "norm.weight", "lm_head.weight": "head.weight"},
        layer="model.layers.{}.",
        block={"attn_norm.weight": "mixer_norm.weight", "mlp_norm.weight": "mlp_norm.weight", **MLP},
        mixers={kind: under("attn.", names) for kind, names in (("gdn", GDN), ("attn", ATTENTION), ("swa", ATTENTION))},
    ),
)
families.register(
    "samba",
    Family(
        read=read_samba,
        write=write_samba,
        top=mamba.TOP,
        layer=mamba.LAYER,
        block={"mixer_norm.weight": "mixer_norm.weight", "mlp_norm.weight": "mlp_norm.weight", **MLP},
        mixers={kind: under("mixer.", names) for kind, names in (("mamba", mamba.MAMBA), ("swa", ATTENTION), ("attn", ATTENTION))},
    ),
)
