"""Nemotron-H and Nemotron 3: Mamba-2, attention without positions, squared ReLU and experts, each a separate layer.

One of our blocks stands for a layer that mixes tokens and, if the next layer is an MLP or a mixture of experts, for that one too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from zoo.checkpoints.experts import one_by_one
from zoo.checkpoints.family import Family, Names, compact, expect, families, options, under
from zoo.checkpoints.llama import ATTENTION
from zoo.checkpoints.mamba import LAYER, MAMBA2, TOP
from zoo.config import ModelConfig
from zoo.errors import ZooError

WORDS = {"mamba": "mamba2", "linear_attention": "mamba2", "attention": "attn", "full_attention": "attn", "mlp": "relu2", "moe": "moe"}
LETTERS = {"M": "mamba2", "*": "attn", "-": "relu2", "E": "moe"}
ALIASES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_conv_bias": "use_conv_bias",
    "norm_eps": "layer_norm_epsilon",
}
PROJECTIONS = [f"{name}_proj.{part}" for name in ("up", "down") for part in ("weight", "bias")]
LATENT: Names = {
    f"mixer.{theirs}_latent_proj.{part}": f"mlp.{ours}.{part}"
    for theirs, ours in (("fc1", "latent_in"), ("fc2", "latent_out"))
    for part in ("weight", "bias")
}


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    config = {**{name: config[old] for old, name in ALIASES.items() if old in config}, **config}
    expect(config, "mlp_hidden_act", "relu2", default="relu2")
    expect(config, "mamba_hidden_act", "silu", default="silu")
    expect(config, "sliding_window", None)
    for field in ("n_group", "topk_group"):
        expect(config, field, 1, None)
    if missing := [kind for kind in ("block_configs", "moe_configs") if config.get(kind)]:
        raise ZooError(f"{missing[0]}: layers of different widths are not supported")
    layers: list[tuple[str, str]] = []
    for number, kind in enumerate(read_kinds(config)):
        if kind in ("mamba2", "attn"):
            layers.append((kind, "none"))
        elif not layers or layers[-1][1] != "none":
            raise ZooError(f"layers_block_type: layer {number} is an MLP or a mixture of experts that follows no mamba or attention layer")
        else:
            layers[-1] = layers[-1][0], kind
    mixers, mlps = [kind for kind, _ in layers], [kind for _, kind in layers]
    heads, eps, bias = config.get("num_attention_heads", 32), config.get("layer_norm_epsilon", 1e-5), config.get("mlp_bias", False)
    blocks = {
        "attn": {
            "heads": heads,
            "kv_heads": config.get("num_key_value_heads", 8) or heads,
            "head_dim": config.get("head_dim", 128),
            "rotary": 0.0,
        },
        "mamba2": {
            "heads": config.get("mamba_num_heads", 128),
            "head_dim": config.get("mamba_head_dim", 64),
            "state_dim": config.get("ssm_state_size", 128),
            "groups": config.get("n_groups", 8),
            "conv_size": config.get("conv_kernel", 4),
            "conv_bias": config.get("use_conv_bias", True),
            "bias": config.get("use_bias", False),
            "norm_eps": eps,
        },
    }
    moe = {
        **{"expert": "relu2", "score": "sigmoid", "correction": True, "wide_router": True, "normalise_eps": 1e-20, "bias": bias},
        "experts": config.get("n_routed_experts", 8),
        "top_k": config.get("num_experts_per_tok", 2),
        "width": config.get("moe_intermediate_size", 7688),
        "shared": config.get("moe_shared_expert_intermediate_size", 7688),
        "latent": config.get("moe_latent_size"),
        "normalise": config.get("norm_topk_prob", True),
        "scale": config.get("routed_scaling_factor", 1.0),
    }
    return {
        "vocab_size": config["vocab_size"],
        "d_model": config["hidden_size"],
        "d_ff": config.get("intermediate_size", 21_504),
        "norm": "wide",
        "norm_eps": eps,
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "layers": compact(mixers),
        "blocks": {kind: blocks[kind] for kind in set(mixers)},
        "mlp": compact(mlps),
        "mlps": {kind: options for kind, options in (("relu2", {"bias": bias}), ("moe", moe)) if kind in mlps},
    }


def read_kinds(config: Mapping[str, Any]) -> list[str]:
    """Return the kind of every upstream layer."""
    if types := config.get("layers_block_type"):
        return [WORDS[expect({"layers_block_type": name}, "layers_block_type", *WORDS)] for name in types]
    pattern = config["hybrid_override_pattern"]
    if unknown := re.sub(r"[M*E-]", "", pattern):
        raise ZooError(f"hybrid_override_pattern: {unknown[0]!r} is not a kind of layer; allowed: M, *, -, E")
    return [LETTERS[letter] for letter in pattern]


def write(config: ModelConfig) -> dict[str, Any]:
    mamba, attention = options(config, "mamba2"), options(config, "attn")
    moe = config.mlps.get("moe", {}) if "moe" in config.mlp_pattern else {}
    letters = {ours: theirs for theirs, ours in LETTERS.items()} | {"none": ""}
    pattern = "".join(letters[kind] for both in zip(config.pattern, config.mlp_pattern, strict=True) for kind in both)
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": len(pattern),
        "hybrid_override_pattern": pattern,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        "head_dim": attention.head_dim or config.d_model // attention.heads,
        "mamba_num_heads": mamba.heads or mamba.expand * config.d_model // mamba.head_dim,
        "mamba_head_dim": mamba.head_dim,
        "ssm_state_size": mamba.state_dim,
        "n_groups": mamba.groups,
        "conv_kernel": mamba.conv_size,
        "use_conv_bias": mamba.conv_bias,
        "use_bias": mamba.bias,
        "mlp_hidden_act": "relu2",
        "mlp_bias": next((fields.get("bias", False) for fields in config.mlps.values()), False),
        **({theirs: moe[ours] for theirs, ours in ROUTED.items()} if moe else {}),
    }


ROUTED = {
    "n_routed_experts": "experts",
    "num_experts_per_tok": "top_k",
    "moe_intermediate_size": "width",
    "moe_shared_expert_intermediate_size": "shared",
    "moe_latent_size": "latent",
    "norm_topk_prob": "normalise",
    "routed_scaling_factor": "scale",
}
MLP_NORM: Names = {"norm.weight": "mlp_norm.weight"}
families.register(
    "nemotron_h",
    Family(
        read=read,
        write=write,
        top=TOP,
        layer=LAYER,
        block={"norm.weight": "mixer_norm.weight"},
        mixers={
            "mamba2": under("mixer.", MAMBA2),
            "attn": {f"mixer.{name.removeprefix('self_attn.')}": ours for name, ours in ATTENTION.items() if isinstance(name, str)},
        },
        mlps={
            "relu2": {**MLP_NORM, **{f"mixer.{name}": f"mlp.{name}" for name in PROJECTIONS}},
            "moe": {
                **MLP_NORM,
                **LATENT,
                **one_by_one("mixer.", "gate.weight", ("up_proj",)),
                "mixer.gate.e_score_correction_bias": "mlp.router.correction",
                **{f"mixer.shared_experts.{name}": f"mlp.shared.{name}" for name in PROJECTIONS},
            },
        },
        mlp_apart=True,
        unused=r"mtp\.",
    ),
)
