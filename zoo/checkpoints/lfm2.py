"""LFM2: gated short convolutions and attention; with experts, LFM2-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from zoo.checkpoints.experts import one_by_one
from zoo.checkpoints.family import Family, Names, Taps, compact, expect, families, layer_kinds, options
from zoo.checkpoints.llama import LAYER, heads, write_heads
from zoo.config import ModelConfig

KINDS = {"conv": "conv", "full_attention": "attn"}
PARTS = ("weight", "bias")
ATTENTION: Names = {
    **{f"self_attn.{name}_proj.weight": f"{name}_proj.weight" for name in "qkv"},
    "self_attn.out_proj.weight": "o_proj.weight",
    **{f"self_attn.{name}_layernorm.weight": f"{name}_norm.weight" for name in "qk"},
}
CONV: Names = {
    **{f"conv.{theirs}.{part}": f"{ours}.{part}" for theirs, ours in (("in_proj", "in_proj"), ("out_proj", "o_proj")) for part in PARTS},
    "conv.conv.weight": Taps(("conv_weight",)),
    "conv.conv.bias": "conv_bias",
}


def read(config: Mapping[str, Any], *, moe: bool) -> dict[str, Any]:
    expect(config, "block_use_swiglu", True, default=True)
    expect(config, "use_pos_enc", True, default=True)
    places, count = config.get("full_attn_idxs"), config["num_hidden_layers"]
    kinds = layer_kinds(config, KINDS, lambda i: "attn" if places is None or i in places else "conv")
    for field in ("block_dim", "conv_dim", "conv_dim_out"):
        expect(config, field, config["hidden_size"], None)
    eps = config.get("norm_eps", 1e-5)
    attention = {**heads(config, kv_heads=8, theta=1e6, context=128_000), "qk_norm": "plain", "norm_eps": eps}
    blocks = {"attn": attention, "conv": {"conv_size": config.get("conv_L_cache", 3), "bias": config.get("conv_bias", False)}}
    fields = {
        "vocab_size": config["vocab_size"],
        "d_model": config["hidden_size"],
        "d_ff": config.get("intermediate_size", 7168) if moe else width(config),
        "norm_eps": eps,
        "tie_embeddings": config.get("tie_embedding", config.get("tie_word_embeddings", True)),
        "layers": compact(kinds),
        "blocks": {kind: blocks[kind] for kind in set(kinds)},
    }
    dense = min(config.get("num_dense_layers", 2), count)
    if not moe or dense == count:
        return fields
    routed = {
        **{"score": "sigmoid", "correction": config.get("use_expert_bias", True), "normalise_eps": 1e-6},
        "experts": config.get("num_experts", 32),
        "top_k": config.get("num_experts_per_tok", 4),
        "width": config.get("moe_intermediate_size", 1792),
        "normalise": config.get("norm_topk_prob", True),
        "scale": config.get("routed_scaling_factor", 1.0),
    }
    return {**fields, "mlp": compact(["swiglu"] * dense + ["moe"] * (count - dense)), "mlps": {"moe": routed}}


def width(config: Mapping[str, Any]) -> int:
    """Return the width of the MLPs, which upstream may derive from the stated one."""
    stated: int = config.get("block_ff_dim", config.get("intermediate_size", 12_288))
    if not config.get("block_auto_adjust_ff_dim", True):
        return stated
    stated = int(2 * stated / 3)
    if (factor := config.get("block_ffn_dim_multiplier", 1.0)) is not None:
        stated = int(factor * stated)
        multiple = config.get("block_multiple_of", 256)
        stated = multiple * -(-stated // multiple)
    return stated


def write(config: ModelConfig, *, moe: bool) -> dict[str, Any]:
    words, conv = {ours: theirs for theirs, ours in KINDS.items()}, options(config, "conv")
    fields = {
        "architectures": ["Lfm2MoeForCausalLM" if moe else "Lfm2ForCausalLM"],
        "model_type": "lfm2_moe" if moe else "lfm2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": len(config.pattern),
        "norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "layer_types": [words[kind] for kind in config.pattern],
        "conv_L_cache": conv.conv_size,
        "conv_bias": conv.bias,
        **write_heads(config),
    }
    if not moe:
        return {**fields, "block_auto_adjust_ff_dim": False}
    routed = config.mlps.get("moe", {})
    return {
        **fields,
        "num_dense_layers": sum(kind != "moe" for kind in config.mlp_pattern),
        "use_expert_bias": routed.get("correction", False),
        **{theirs: routed[ours] for theirs, ours in ROUTED.items() if ours in routed},
    }


ROUTED = {
    "num_experts": "experts",
    "num_experts_per_tok": "top_k",
    "moe_intermediate_size": "width",
    "norm_topk_prob": "normalise",
    "routed_scaling_factor": "scale",
}
DENSE = Family(
    read=partial(read, moe=False),
    write=partial(write, moe=False),
    top={"model.embed_tokens.weight": "embed.weight", "model.embedding_norm.weight": "norm.weight", "lm_head.weight": "head.weight"},
    layer=LAYER,
    block={
        "operator_norm.weight": "mixer_norm.weight",
        "ffn_norm.weight": "mlp_norm.weight",
        **{f"feed_forward.w{n}.weight": f"mlp.{name}_proj.weight" for n, name in ((1, "gate"), (3, "up"), (2, "down"))},
    },
    mixers={"attn": ATTENTION, "conv": CONV},
)
families.register("lfm2", DENSE)
MOE: Names = {
    **one_by_one("feed_forward.", "gate.weight", ("w1", "w3"), "w2"),
    "feed_forward.expert_bias": "mlp.router.correction",
}
families.register("lfm2_moe", replace(DENSE, read=partial(read, moe=True), write=partial(write, moe=True), mlps={"moe": MOE}))
