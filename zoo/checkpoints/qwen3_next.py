"""Qwen3-Next and Qwen3.5: Gated DeltaNet interleaved with gated attention, with SwiGLU or experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from zoo.checkpoints.experts import gated, one_by_one, stacked
from zoo.checkpoints.family import Family, Names, Stacked, Taps, compact, expect, families, layer_kinds, options, renamed
from zoo.checkpoints.llama import ATTENTION, BLOCK, LAYER, TOP, heads, read_bias, size, write_heads, write_size
from zoo.config import ModelConfig

GATED_ATTENTION: Names = {
    **ATTENTION,
    **{f"self_attn.q_proj.{part}": Stacked((f"q_proj.{part}", f"g_proj.{part}"), per="heads") for part in ("weight", "bias")},
}
SHARED: Names = {
    "linear_attn.conv1d.weight": Taps(("q_conv", "k_conv", "v_conv")),
    "linear_attn.A_log": "A_log",
    "linear_attn.dt_bias": "dt_bias",
    "linear_attn.norm.weight": "o_norm.weight",
    "linear_attn.out_proj.weight": "o_proj.weight",
}
QWEN3_NEXT: Names = {
    **SHARED,
    "linear_attn.in_proj_qkvz.weight": Stacked(("q_proj.weight", "k_proj.weight", "v_proj.weight", "g_proj.weight"), per="heads"),
    "linear_attn.in_proj_ba.weight": Stacked(("b_proj.weight", "a_proj.weight"), per="heads"),
}
QWEN3_5: Names = {
    **SHARED,
    "linear_attn.in_proj_qkv.weight": Stacked(("q_proj.weight", "k_proj.weight", "v_proj.weight")),
    "linear_attn.in_proj_z.weight": "g_proj.weight",
    "linear_attn.in_proj_b.weight": "b_proj.weight",
    "linear_attn.in_proj_a.weight": "a_proj.weight",
}
KINDS = {"linear_attention": "gdn", "full_attention": "attn"}
SHARED_EXPERT: Names = {**gated("mlp.shared_expert.", "mlp.shared."), "mlp.shared_expert_gate.weight": "mlp.shared_gate.weight"}
ONE_BY_ONE: Names = {**SHARED_EXPERT, **one_by_one("mlp.", "gate.weight")}
STACKED: Names = {**SHARED_EXPERT, **stacked("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")}


def read(config: Mapping[str, Any], kv_heads: int = 4) -> dict[str, Any]:
    every = config.get("full_attention_interval", 4)
    kinds = layer_kinds(config, KINDS, lambda i: "gdn" if (i + 1) % every else "attn")
    eps = config.get("rms_norm_eps", 1e-6)
    key_dim, value_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]
    attention = {**heads(config, kv_heads, head_dim=256, part=0.25, context=32_768), **read_bias(config)}
    attention |= {"qk_norm": "centred", "norm_eps": eps, "gate": True}
    gdn = {
        "heads": config["linear_num_key_heads"],
        "value_heads": config["linear_num_value_heads"],
        "head_dim": key_dim,
        "expand_v": value_dim / key_dim,
        "conv_size": config.get("linear_conv_kernel_dim", 4),
        "norm_eps": eps,
    }
    blocks = {"attn": attention, "gdn": gdn}
    return {**size(config), "norm": "centred", "layers": compact(kinds), "blocks": {kind: blocks[kind] for kind in set(kinds)}}


def experts(config: Mapping[str, Any], count: int, top_k: int) -> dict[str, Any]:
    """Read the options of the experts; the other arguments are upstream's defaults."""
    return {
        "experts": config.get("num_experts", count),
        "top_k": config.get("num_experts_per_tok", top_k),
        "width": config.get("moe_intermediate_size", 512),
        "normalise": config.get("norm_topk_prob", True),
        "shared": config.get("shared_expert_intermediate_size", 512),
        "shared_gate": True,
    }


def read_next(config: Mapping[str, Any]) -> dict[str, Any]:
    count, step, dense = config.get("num_experts", 512), config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    kinds = ["moe" if count and i not in dense and (i + 1) % step == 0 else "swiglu" for i in range(config["num_hidden_layers"])]
    mlps = {"mlp": compact(kinds), "mlps": {"moe": experts(config, 512, 10)}} if "moe" in kinds else {}
    return {**read(config, kv_heads=2), **mlps}


def read_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    moe = experts({**config, "norm_topk_prob": True}, 256, 8)
    return {**read({**config, "intermediate_size": None}, kv_heads=2), "mlp": "moe", "mlps": {"moe": moe}}


def read_multimodal_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read Qwen3.5 with experts and a vision tower, which is dropped."""
    text = {"tie_word_embeddings": config.get("tie_word_embeddings", False), **config["text_config"]}
    expect(text, "model_type", "qwen3_5_moe_text", default="qwen3_5_moe_text")
    return read_moe(text)


def read_multimodal(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read Qwen3.5 with a vision tower, which is dropped. The model is written back as the text model."""
    text = {"tie_word_embeddings": config.get("tie_word_embeddings", False), **config["text_config"]}
    expect(text, "model_type", "qwen3_5_text", default="qwen3_5_text")
    return {**read(text), "upstream": {**text, "model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"]}}


def write_layers(config: ModelConfig, gdn: Any) -> dict[str, Any]:
    """Return the kinds of the layers and the sizes of Gated DeltaNet, under upstream's names."""
    words = {ours: theirs for theirs, ours in KINDS.items()}
    key_dim = gdn.head_dim or config.d_model // gdn.heads
    return {
        "layer_types": [words[kind] for kind in config.pattern],
        "linear_num_key_heads": gdn.heads,
        "linear_num_value_heads": gdn.value_heads or gdn.heads,
        "linear_key_head_dim": key_dim,
        "linear_value_head_dim": round(key_dim * gdn.expand_v),
        "linear_conv_kernel_dim": gdn.conv_size,
    }


def write(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    gdn, attention = options(config, "gdn"), options(config, "attn")
    layers = range(len(config.pattern))
    dense = {"mlp_only_layers": [i for i in layers if config.mlp_pattern[i] != "moe"]} if model_type == "qwen3_next" else {}
    moe = config.mlps.get("moe") if "moe" in config.mlp_pattern else None
    routed = {
        "num_experts": moe["experts"] if moe else 0,
        "num_experts_per_tok": moe["top_k"] if moe else 0,
        "moe_intermediate_size": moe.get("width") if moe else 0,
        "shared_expert_intermediate_size": moe.get("shared") if moe else 0,
        "norm_topk_prob": moe.get("normalise", True) if moe else True,
    }
    return {
        **write_size(config, model_type, architecture),
        **write_heads(config),
        "partial_rotary_factor": attention.rotary,
        "attention_bias": attention.bias,
        **write_layers(config, gdn),
        **dense,
        **(routed if moe or dense else {}),
    }


def write_multimodal_moe(config: ModelConfig) -> dict[str, Any]:
    text = write(config, "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM")
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": text,
        "tie_word_embeddings": config.tie_embeddings,
    }


TEXT = Family(
    read=read,
    write=partial(write, model_type="qwen3_5_text", architecture="Qwen3_5ForCausalLM"),
    top=TOP,
    layer=LAYER,
    block=BLOCK,
    mixers={"attn": GATED_ATTENTION, "gdn": QWEN3_5},
    unused=r"mtp\.|model\.visual\.",  # multi-token prediction; vision
)
families.register("qwen3_5_text", TEXT)
families.register(
    "qwen3_next",
    replace(
        TEXT,
        read=read_next,
        write=partial(write, model_type="qwen3_next", architecture="Qwen3NextForCausalLM"),
        mixers={"attn": GATED_ATTENTION, "gdn": QWEN3_NEXT},
        mlps={"moe": ONE_BY_ONE},
    ),
)


def multimodal(family: Family) -> Family:
    """Return the names of a language model that is stored with a vision tower."""
    top = renamed(TOP, lambda name: name.replace("model.", "model.language_model."))
    return replace(family, top=top, layer=LAYER.replace("model.", "model.language_model."))


families.register("qwen3_5", replace(multimodal(TEXT), read=read_multimodal, write=None))
MOE = replace(
    TEXT, read=read_moe, write=partial(write, model_type="qwen3_5_moe_text", architecture="Qwen3_5MoeForCausalLM"), mlps={"moe": ONE_BY_ONE}
)
families.register("qwen3_5_moe_text", replace(MOE, forms={"stacked": replace(MOE, mlps={"moe": STACKED})}))
MOE = replace(multimodal(MOE), read=read_multimodal_moe, write=write_multimodal_moe)
families.register("qwen3_5_moe", replace(MOE, mlps={"moe": STACKED}, forms={"one by one": MOE}))
