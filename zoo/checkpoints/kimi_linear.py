"""Kimi Linear: Kimi Delta Attention and latent attention without positions, with SwiGLU or experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zoo.checkpoints.experts import gated, one_by_one
from zoo.checkpoints.family import Family, Heads, Names, Stacked, Taps, compact, expect, families, layer_kinds, options
from zoo.checkpoints.llama import BLOCK, LAYER, TOP, size, write_size
from zoo.config import ModelConfig

KINDS = {"linear_attention": "kda", "full_attention": "mla"}
MLPS = {"dense": "swiglu", "sparse": "moe"}
KDA: Names = {
    **{f"self_attn.{name}.weight": f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "b_proj", "o_proj", "o_norm")},
    **{f"self_attn.{name}.weight": f"{name}.weight" for name in ("f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj")},
    **{f"self_attn.{name}_conv1d.weight": Taps((f"{name}_conv",)) for name in "qkv"},
    "self_attn.A_log": Heads(("A_log",)),
    "self_attn.dt_bias": "dt_bias",
}
MLA: Names = {
    "self_attn.q_proj.weight": "q_proj.weight",
    **{f"self_attn.kv_a_proj_with_mqa.{part}": f"kv_proj.{part}" for part in ("weight", "bias")},
    "self_attn.kv_a_layernorm.weight": "kv_norm.weight",
    "self_attn.kv_b_proj.weight": Stacked(("key_up", "value_up"), per="heads"),
    **{f"self_attn.o_proj.{part}": f"o_proj.{part}" for part in ("weight", "bias")},
}
SPARSE = "block_sparse_moe."
MOE: Names = {
    **one_by_one(SPARSE, "gate.weight", ("w1", "w3"), "w2"),
    **gated(f"{SPARSE}shared_experts.", "mlp.shared."),
    f"{SPARSE}gate.e_score_correction_bias": "mlp.router.correction",
}


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse_kimi_k3(config)
    linear = config.get("linear_attn_config") or {}
    full = linear.get("full_attn_layers")
    kinds = layer_kinds(config, KINDS, lambda i: "mla" if (i + 1 in full if full is not None else i and i % 4 == 0) else "kda")
    dense = config.get("first_k_dense_replace", 1)
    mlps = layer_kinds(config, MLPS, lambda i: "swiglu" if i < dense else "moe", "mlp_layer_types")
    heads, eps = config["num_attention_heads"], config.get("rms_norm_eps", 1e-5)
    blocks = {
        "kda": {
            "heads": linear.get("num_heads", config.get("linear_num_heads", 32)),
            "head_dim": linear.get("head_dim", config.get("linear_head_dim", 128)),
            "conv_size": linear.get("short_conv_kernel_size", config.get("linear_conv_kernel_dim", 4)),
            "norm_eps": eps,
        },
        "mla": {
            "heads": heads,
            "rank": config.get("kv_lora_rank", 512),
            "head_dim": config.get("qk_nope_head_dim", 128),
            "shared_dim": config.get("qk_rope_head_dim", 64),
            "value_dim": config.get("v_head_dim", 128),
            "bias": expect(config, "attention_bias", False, True, None) or False,
        },
    }
    width, shared = config.get("moe_intermediate_size", 1024), config.get("num_shared_experts", 1)
    moe = {
        **{"score": "sigmoid", "correction": True, "wide_router": True, "normalise_eps": 1e-20},
        "experts": config.get("num_experts", 256),
        "top_k": config.get("num_experts_per_token", 8),
        "width": width,
        "shared": width * shared if shared else None,
        "normalise": config.get("moe_renormalize", True),
        "scale": config.get("routed_scaling_factor", 2.446),
    }
    return {
        **size(config),
        "norm_eps": eps,
        "layers": compact(kinds),
        "blocks": {kind: blocks[kind] for kind in set(kinds)},
        "mlp": compact(mlps),
        "mlps": {"moe": moe} if "moe" in mlps else {},
    }


def refuse_kimi_k3(config: Mapping[str, Any]) -> None:
    """Raise ZooError for anything but Kimi Linear: Kimi K3 has the same model_type but different equations."""
    expect(config, "q_lora_rank", None)
    expect(config, "mla_use_nope", True, default=True)
    expect(config, "num_key_value_heads", config["num_attention_heads"], None)
    expect(config, "moe_router_activation_func", "sigmoid", default="sigmoid")
    expect(config, "moe_layer_freq", 1, default=1)
    expect(config, "num_expert_group", 1, None)


def write(config: ModelConfig) -> dict[str, Any]:
    kda, mla = options(config, "kda"), options(config, "mla")
    words, mlp_words = ({ours: theirs for theirs, ours in names.items()} for names in (KINDS, MLPS))
    head_dim = mla.head_dim or config.d_model // mla.heads
    return {
        **write_size(config, "kimi_linear", "KimiLinearForCausalLM"),
        "num_attention_heads": mla.heads,
        "num_key_value_heads": mla.heads,
        "kv_lora_rank": mla.rank,
        "q_lora_rank": None,
        "qk_nope_head_dim": head_dim,
        "qk_rope_head_dim": mla.shared_dim,
        "v_head_dim": mla.value_dim or head_dim,
        "attention_bias": mla.bias,
        "linear_num_heads": kda.heads,
        "linear_head_dim": kda.head_dim or config.d_model // kda.heads,
        "linear_conv_kernel_dim": kda.conv_size,
        "layer_types": [words[kind] for kind in config.pattern],
        "mlp_layer_types": [mlp_words[kind] for kind in config.mlp_pattern],
        "pad_token_id": None,  # upstream's default is in a vocabulary of 163,840
        **(write_experts(config.mlps["moe"]) if "moe" in config.mlp_pattern else {}),
    }


def write_experts(moe: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": moe["experts"],
        "num_experts_per_token": moe["top_k"],
        "moe_intermediate_size": moe["width"],
        "num_shared_experts": (moe.get("shared") or 0) // moe["width"],
        "moe_renormalize": moe.get("normalise", True),
        "routed_scaling_factor": moe.get("scale", 1.0),
    }


KIMI = Family(
    read=read,
    write=write,
    top=TOP,
    layer=LAYER,
    block={name: ours for name, ours in BLOCK.items() if not str(name).startswith("mlp.")},
    mixers={"kda": KDA, "mla": MLA},
    mlps={"swiglu": gated("mlp.", "mlp."), "moe": MOE},
)
# transformers writes the dense layers under the name of the sparse ones
families.register("kimi_linear", replace(KIMI, forms={"transformers": replace(KIMI, mlps={"swiglu": gated(SPARSE, "mlp."), "moe": MOE})}))
